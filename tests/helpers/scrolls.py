"""Made-up data of every SCROLLS task, in the benchmark's own layout."""

import json
import zipfile
from pathlib import Path

from megatron_bipe.tasks.scrolls.tasks import TASKS

CHOICES = {"contract_nli": ("Entailment", "Contradiction", "Not mentioned")}


def rows_of(task: str, split: str, count: int = 6) -> list[dict[str, str | None]]:
    """Return rows whose inputs appear twice, with two outputs, as in Qasper and NarrativeQA."""
    found = []
    for number in range(count):
        text = f"what is {number} of {task}?\n\nit is said . that {task} has {number}.\nand no more\n" * 3
        for version in range(2 if number % 2 else 1):
            choices = CHOICES.get(task, (f"the {number}", f"{number} of them"))
            found.append(
                {
                    "id": f"{task}-{number}",
                    "pid": f"{task}-{number}_{version}",
                    "input": text,
                    "output": None if split == "test" else choices[(number + version) % len(choices)],
                }
            )
    return found


def write_benchmark(folder: Path) -> Path:
    """Write all splits of all tasks, those of Qasper in a zip file as on the Hub."""
    for task in TASKS:
        for split in ("train", "validation", "test"):
            lines = "".join(json.dumps(row) + "\n" for row in rows_of(task, split))
            if task == "qasper":
                folder.mkdir(parents=True, exist_ok=True)
                with zipfile.ZipFile(folder / "qasper.zip", "a") as archive:
                    archive.writestr(f"qasper/{split}.jsonl", lines)
            else:
                (folder / task).mkdir(parents=True, exist_ok=True)
                (folder / task / f"{split}.jsonl").write_text(lines)
    return folder
