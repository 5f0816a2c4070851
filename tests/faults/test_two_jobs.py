"""A second launch on a run folder is refused until the first has ended, whatever the first is doing."""

import time

from megatron_bipe.checkpoint.find import list_steps
from tests.helpers.commands import options
from tests.helpers.ranks import patience, start_program
from tests.helpers.tools import pretrain_program, run_pretrain

TIME_LIMIT_S = 60


def arguments(data, run_dir, *settings, stop_step):
    return ["--stop-step", str(stop_step), *options(data, run_dir, *settings, steps=100_000)]


def test_two_jobs_on_one_run_folder_the_second_is_refused_until_the_first_is_gone(text_dataset, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "first.log"
    endless = arguments(text_dataset, run_dir, "train.save_every=5", stop_step=100_000)
    first = start_program(*pretrain_program(endless), log=log)
    try:
        until_s = time.monotonic() + patience(TIME_LIMIT_S)
        while not (run_dir / "checkpoints" / "latest").exists():
            assert first.is_alive() and time.monotonic() < until_s, log.read_text()
            time.sleep(0.05)
        [second] = run_pretrain(arguments(text_dataset, run_dir, stop_step=100_000), tmp_path / "second", code=1)
        assert "Another run" in second.output and str(run_dir) in second.output
        assert first.is_alive()
    finally:
        first.kill()
        first.join()
    assert "Traceback" not in log.read_text()
    saved = list_steps(run_dir)[-1]

    def train(*settings, stop_step, allow=(), code=0):
        given = arguments(text_dataset, run_dir, *settings, stop_step=stop_step)
        [ended] = run_pretrain([*given, *allow], tmp_path / "later", code=code)
        return ended.output

    assert f"continuing {run_dir} from step " in train(stop_step=saved + 10)
    changed = train("optimizer.lr=2e-4", "train.seed=7", stop_step=saved + 20, code=2)
    for field, values in (("optimizer.lr", ("0.0001", "0.0002")), ("train.seed", ("1234", "7"))):
        assert field in changed and all(value in changed for value in values)
    allowed = train("optimizer.lr=2e-4", stop_step=saved + 20, allow=["--allow", "optimizer"])
    assert f"continuing {run_dir} from step {saved + 10}" in allowed
