"""Messages and commands of a complete run under the supervisor, whose first launch fails."""

import json

import pytest

from megatron_bipe.run_files import read_events
from tests.helpers.commands import options, run
from tests.helpers.small_runs import supervised
from tests.helpers.webhook import status, webhook

AFTER_SAVE = 'echo "$BIPE_STEP" >> "$BIPE_RUN_DIR/saved"; [ "$BIPE_STEP" != 2 ]'
FAIL_ONCE = '[ -e "$0" ] || { touch "$0"; exit 3; }; exec "$@"'  # $0: a file that shows that this is not the first try


@pytest.mark.slow
def test_run_tells_its_webhook_and_commands_what_happens(text_dataset, tmp_path, free_port):
    run_dir = tmp_path / "run"
    port = str(free_port())
    with webhook(status(200)) as server:
        settings = (f"checkpoint.after_save={AFTER_SAVE}", "train.save_every=1", f"alerts.webhook={server.url}")
        pretrain = ["pretrain.py", "--ds_config", "ds_configs/zero1.json", *options(text_dataset, run_dir, *settings)]
        launch = ["torchrun", "--nproc-per-node", "1", "--master-port", port, *pretrain]
        ended = run(*supervised(run_dir, ["bash", "-c", FAIL_ONCE, str(tmp_path / "tried"), *launch]))
    assert ended.code == 0 and not ended.left, ended.output
    told = [(message["event"], message.get("step")) for message in server.received]
    assert sorted(told, key=str) == [("after save failed", 2), ("done", 2), ("start", 0)]
    assert (run_dir / "saved").read_text().split() == ["1", "2"]
    assert "after save failed" in [event["event"] for event in read_events(run_dir)]
    texts = [ended.output, (run_dir / "config.yaml").read_text()]
    texts += [path.read_text() for path in run_dir.glob("checkpoints/*/state.json")]
    assert len(texts) == 4 and not any("SECRET" in text for text in texts)
    assert json.loads(texts[-1])["config"]["alerts"]["webhook"]
