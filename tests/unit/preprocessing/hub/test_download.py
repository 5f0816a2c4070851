"""Downloads from a fake Hub are complete or leave nothing, resume where they stopped, and fetch nothing twice."""

import errno
import json
import os
import random
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import WeakFileLock

from megatron_bipe.errors import DataError
from preprocessing.hub import download as library
from preprocessing.hub.download import Meter, Stopped, download, run_in_threads
from preprocessing.hub.plan import LOCK_NAME, RECEIPT_NAME, DownloadOptions, State, make_plan
from tests.helpers.errors import raises
from tests.helpers.hub import Fault, Hub, serve

REPO = "owner/corpus"
SMALL, FIRST, SECOND, VAL = FILES = ("README.md", "train/00.jsonl.zst", "train/01.jsonl.zst", "val.jsonl.zst")
NUM_BYTES = 50_000
CHUNK_BYTES = 1000  # what arrives in full reaches the disk; what `huggingface_hub` uses is 10 MB


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "train").mkdir(parents=True)
    for seed, path in enumerate(FILES):
        (folder / path).write_bytes(random.Random(seed).randbytes(NUM_BYTES))
    return folder


@pytest.fixture
def hub(source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # `huggingface_hub` sleeps before it tries again
    monkeypatch.setattr(library, "WAITS_S", (0.0, 0.0))
    monkeypatch.setattr(library, "LOCK_WAIT_S", 0.01)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", CHUNK_BYTES)
    with serve({REPO: {"main": source}}) as hub:
        yield hub


@pytest.fixture
def options(tmp_path: Path, hub: Hub) -> DownloadOptions:
    return DownloadOptions(tmp_path / "out", REPO, workers=2, endpoint=hub.endpoint)


@pytest.fixture
def only_first(options: DownloadOptions) -> DownloadOptions:
    return replace(options, include=[FIRST])


def content(folder: Path) -> dict[str, bytes]:
    """The files of a folder, less those of the download itself."""
    found = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    return {path: data for path, data in found.items() if path not in (RECEIPT_NAME, LOCK_NAME)}


def test_download_sends_no_token_over_http(
    options: DownloadOptions, hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download(options)
    assert hub.requests and not any(request.token for request in hub.requests)


def test_download_all_files_arrive_and_the_receipt_names_the_commit(
    options: DownloadOptions, hub: Hub, source: Path
) -> None:
    snapshot, num_fetched = download(options)
    assert content(options.output) == content(source)
    assert num_fetched == len(FILES)
    receipt = json.loads((options.output / RECEIPT_NAME).read_bytes())
    assert (receipt["repo"], receipt["commit"]) == (REPO, hub.commit(REPO)) == (snapshot.repo, snapshot.commit)
    assert set(receipt["files"]) == set(FILES)
    assert snapshot.licence == "mit"


def test_download_again_fetches_nothing(options: DownloadOptions, hub: Hub) -> None:
    download(options)
    hub.requests.clear()
    assert download(options).num_fetched == 0
    assert all(request.path.startswith("/api/") for request in hub.requests)


def test_download_include_fetches_what_matches_and_a_later_run_the_rest(options: DownloadOptions, hub: Hub) -> None:
    download(replace(options, include=["train/0*", VAL]))
    assert set(content(options.output)) == {FIRST, SECOND, VAL}
    hub.requests.clear()
    download(options)
    assert set(content(options.output)) == set(FILES)
    assert hub.downloads("*") == []  # README.md is not a large file


def test_download_connection_cut_goes_on_from_there(only_first: DownloadOptions, hub: Hub, source: Path) -> None:
    hub.faults += [Fault("/cdn/*", cut_after=20_500), Fault("/cdn/*", cut_after=0), Fault("/cdn/*", cut_after=5_000)]
    download(only_first)
    assert content(only_first.output) == {FIRST: (source / FIRST).read_bytes()}
    assert hub.downloads(FIRST) == [None, "bytes=20000-", "bytes=20000-", "bytes=25000-"]


def test_download_connection_reset_and_busy_hub_are_waited_for(
    only_first: DownloadOptions, hub: Hub, source: Path
) -> None:
    hub.faults += [Fault("/cdn/*", cut_after=9_000, reset=True), Fault("/datasets/*", status=503, times=2)]
    download(only_first)
    assert content(only_first.output) == {FIRST: (source / FIRST).read_bytes()}


def test_download_ended_run_keeps_its_part_and_the_next_goes_on_from_it(
    only_first: DownloadOptions, hub: Hub, source: Path
) -> None:
    cut, gone = Fault("/cdn/*", cut_after=20_500), Fault("/cdn/*", status=404, times=99)
    hub.faults += [cut, gone]
    with raises(DataError, 404, location=REPO):
        download(only_first)
    expected = (source / FIRST).read_bytes()
    assert content(only_first.output) == {f"{FIRST}.partial": expected[:20_000]}
    assert json.loads((only_first.output / RECEIPT_NAME).read_bytes())["commit"] == hub.commit(REPO)
    (item,) = make_plan(only_first).items
    assert (item.state, item.fetch_bytes) == (State.PARTIAL, NUM_BYTES - 20_000)
    hub.faults.clear()
    hub.requests.clear()
    download(only_first)
    assert content(only_first.output) == {FIRST: expected}
    assert hub.downloads("*") == ["bytes=20000-"]


@pytest.mark.parametrize(
    ("part", "asked"),
    [
        (lambda data: data, []),  # all there: the run ended before the check
        (lambda data: data + b"more", [None]),
        (lambda data: b"x" + data[1:30_000], ["bytes=30000-", None]),  # of something else
    ],
)
def test_download_any_part_ends_as_the_right_file(
    only_first: DownloadOptions, hub: Hub, source: Path, part: object, asked: list[str | None]
) -> None:
    expected = (source / FIRST).read_bytes()
    place = only_first.output / f"{FIRST}.partial"
    place.parent.mkdir(parents=True)
    place.write_bytes(part(expected))
    download(only_first)
    assert content(only_first.output) == {FIRST: expected}
    assert hub.downloads("*") == asked


def test_download_server_without_ranges_still_gives_the_right_file(
    only_first: DownloadOptions, hub: Hub, source: Path
) -> None:
    hub.faults += [Fault("/cdn/*", cut_after=20_500), Fault("/cdn/*", no_range=True)]
    download(only_first)
    assert content(only_first.output) == {FIRST: (source / FIRST).read_bytes()}


@pytest.mark.parametrize(("path", "url"), [(FIRST, "/cdn/*"), (SMALL, "/datasets/*")])
def test_download_wrong_byte_is_seen_and_the_file_fetched_again(
    options: DownloadOptions, hub: Hub, source: Path, path: str, url: str
) -> None:
    hub.faults.append(Fault(url, flip_at=40_000))
    download(replace(options, include=[path]))
    assert content(options.output) == {path: (source / path).read_bytes()}


def test_download_file_that_stays_wrong_is_named_and_the_others_arrive(
    options: DownloadOptions, hub: Hub, source: Path
) -> None:
    hub.faults.append(Fault(f"/cdn/*/{FIRST}", flip_at=40_000, times=99))
    with raises(DataError, "1 of 4", FIRST, location=options.output):
        download(replace(options, workers=1))
    assert set(content(options.output)) == {SMALL, SECOND, VAL}
    assert len(hub.downloads(FIRST)) == library.ATTEMPTS
    hub.faults.clear()
    assert download(options).num_fetched == 1
    assert content(options.output) == content(source)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"x" + data[1:]])
def test_download_damaged_file_is_found_and_fetched_again(
    options: DownloadOptions, hub: Hub, source: Path, damage: object
) -> None:
    download(options)
    damaged = options.output / FIRST
    damaged.write_bytes(damage(damaged.read_bytes()))
    os.utime(damaged, (1, 1))  # any time but the one of the receipt
    hub.requests.clear()
    assert download(options).num_fetched == 1
    assert content(options.output) == content(source)
    assert hub.downloads("*") == [None]


def test_download_damage_that_leaves_size_and_time_is_found_by_verify_and_not_forgotten(
    options: DownloadOptions, hub: Hub, source: Path
) -> None:
    download(options)
    damaged = options.output / FIRST
    status = damaged.stat()
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    os.utime(damaged, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert download(options).num_fetched == 0
    hub.faults.append(Fault("/datasets/*", status=404))
    with raises(DataError, 404, location=REPO):
        download(replace(options, verify=True))
    assert download(options).num_fetched == 1
    assert content(options.output) == content(source)


def test_download_whole_file_from_elsewhere_is_taken_and_another_is_not_replaced_unasked(
    options: DownloadOptions, hub: Hub, source: Path
) -> None:
    options.output.mkdir()
    shutil.copyfile(source / VAL, options.output / VAL)
    (options.output / SMALL).write_bytes(b"my own notes")
    with raises(DataError, 1, SMALL, location=options.output, remedy="--overwrite"):
        download(options)
    assert (options.output / SMALL).read_bytes() == b"my own notes"
    assert download(replace(options, overwrite=True)).num_fetched == 3
    assert content(options.output) == content(source)
    assert hub.downloads(VAL) == []


def test_download_replaces_a_damaged_file_only_once_the_new_one_is_whole(options: DownloadOptions, hub: Hub) -> None:
    download(options)
    (options.output / FIRST).write_bytes(b"damaged")
    hub.faults.append(Fault("/cdn/*", flip_at=0, times=99))
    with raises(DataError, "1 of 1", FIRST, location=options.output):
        download(options)
    assert (options.output / FIRST).read_bytes() == b"damaged"


def test_download_folder_stays_at_its_commit_when_the_branch_moves(
    options: DownloadOptions, hub: Hub, source: Path, tmp_path: Path
) -> None:
    first = hub.commit(REPO)
    download(replace(options, include=[FIRST]))
    newer = tmp_path / "newer"
    shutil.copytree(source, newer)
    (newer / VAL).write_bytes(b"of the newer commit")
    hub.repos[REPO] = {"main": newer, "old": source}
    assert download(options).snapshot.commit == first
    assert content(options.output) == content(source)
    with raises(DataError, REPO, first, hub.commit(REPO), location=options.output):
        download(replace(options, revision="main"))
    fresh = replace(options, output=tmp_path / "fresh")
    assert download(replace(fresh, revision=first)).snapshot.commit == first
    assert content(fresh.output) == content(source)


def test_download_folder_of_another_repository_is_refused(options: DownloadOptions, hub: Hub, tmp_path: Path) -> None:
    download(options)
    other = tmp_path / "other"
    other.mkdir()
    (other / VAL).write_bytes(b"of the other")
    hub.repos["owner/other"] = {"main": other}
    with raises(DataError, REPO, "owner/other", location=options.output):
        download(replace(options, repo="owner/other"))


@pytest.mark.parametrize(
    ("status", "code", "observed", "remedy"),
    [
        (404, "RepoNotFound", ["private"], "OWNER/NAME"),
        (401, "RepoNotFound", ["private"], "hf auth login"),
        (403, "GatedRepo", ["granted"], "hf auth login"),
        (404, "RevisionNotFound", ["revision"], "commit"),
        (401, "", [401], "HF_TOKEN"),
        (403, "", [403], "HF_TOKEN"),
        (500, "", [500], ""),
    ],
)
def test_download_refusal_is_explained_and_leaves_nothing(
    options: DownloadOptions, hub: Hub, status: int, code: str, observed: list[object], remedy: str
) -> None:
    hub.faults.append(Fault("/api/*", status=status, error=code, times=99))
    with raises(DataError, *observed, location=REPO, remedy=remedy):
        download(options)
    assert not options.output.exists()


def test_download_refusal_of_the_files_alone_is_explained(options: DownloadOptions, hub: Hub) -> None:
    hub.faults.append(Fault("/datasets/*", status=403, error="GatedRepo", times=99))
    with raises(DataError, "granted", location=REPO, remedy="hf auth login"):
        download(options)


@pytest.mark.parametrize(
    ("changes", "observed", "location", "remedy"),
    [
        ({"endpoint": "http://127.0.0.1:9"}, [errno.ECONNREFUSED], REPO, "--endpoint"),
        ({"endpoint": "nonsense"}, ["http://"], REPO, "--endpoint"),
        ({"endpoint": "http://127.0.0.1:port"}, ["'port'"], REPO, "https://HOST"),
        ({"repo": "a/b/c"}, ["'a/b/c'"], "a/b/c", "OWNER/NAME"),
        ({"repo": "owner/none"}, ["private"], "owner/none", "OWNER/NAME"),
        ({"revision": "v9"}, ["revision"], f"{REPO}@v9", "commit"),
        ({"include": ["train/0*", "valid*"]}, [REPO, "'valid*'", 4, SMALL], "--include", "'train/0*'"),
        ({"workers": 0}, [0], "--workers", ""),
    ],
)
def test_download_bad_option_is_explained_and_leaves_nothing(
    options: DownloadOptions, changes: dict[str, object], observed: list[object], location: str, remedy: str
) -> None:
    with raises(DataError, *observed, location=location, remedy=remedy):
        download(replace(options, **changes))
    assert not options.output.exists()


def test_download_something_that_is_no_hub_is_said_to_be_none(
    options: DownloadOptions, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.helpers.hub.json.dumps", lambda content: "<html>")
    with raises(DataError, REPO, location=options.endpoint, remedy="--endpoint"):
        make_plan(options)


def test_download_hub_that_fails_for_good_ends_the_run_and_keeps_the_part(
    only_first: DownloadOptions, hub: Hub
) -> None:
    hub.faults += [Fault("/cdn/*", cut_after=20_500), Fault("/cdn/*", status=503, times=99)]
    with raises(DataError, 503, location=REPO):
        download(only_first)
    assert len(content(only_first.output)[f"{FIRST}.partial"]) == 20_000


def test_download_too_little_space_is_an_error_before_the_start(
    options: DownloadOptions, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6, 4 * NUM_BYTES - 1))
    with raises(DataError, "200kB", location="--output", remedy="--include"):
        download(options)
    assert hub.downloads("*") == []
    download(replace(options, include=[FIRST, SECOND]))
    download(replace(options, include=[SMALL, VAL]))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_download_disk_full_midway_is_explained(only_first: DownloadOptions, hub: Hub) -> None:
    part = only_first.output / f"{FIRST}.partial"
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    with raises(DataError, "full", location=part):
        download(only_first)


def test_download_output_that_cannot_be_is_an_error(options: DownloadOptions) -> None:
    options.output.write_text("x")
    with raises(DataError, "a file", location=options.output):
        download(options)
    with raises(DataError, os.strerror(errno.ENOTDIR), location=options.output / "below"):
        download(replace(options, output=options.output / "below"))
    taken = options.output.with_name("taken")
    (taken / FIRST).mkdir(parents=True)
    with raises(DataError, location=taken / FIRST):
        download(replace(options, output=taken))


def test_download_while_another_runs_in_the_folder_is_refused(options: DownloadOptions) -> None:
    options.output.mkdir()
    with (
        WeakFileLock(options.output / LOCK_NAME),
        raises(DataError, "Another run", location=options.output),
    ):
        download(options)
    assert content(options.output) == {}


OUTSIDE = '{"repo": "a/b", "commit": "c", "files": {"../x": {"checksum": "", "size_bytes": 1, "modified_ns": 1}}}'


@pytest.mark.parametrize("text", ["", "{", '{"repo": "owner/corpus", "commit": 3}', "[]", OUTSIDE])
def test_download_damaged_receipt_is_explained(options: DownloadOptions, text: str) -> None:
    options.output.mkdir()
    (options.output / RECEIPT_NAME).write_text(text)
    with raises(DataError, location=options.output / RECEIPT_NAME):
        download(options)


def test_download_without_its_receipt_keeps_the_files_that_are_whole(options: DownloadOptions, hub: Hub) -> None:
    download(options)
    (options.output / RECEIPT_NAME).unlink()
    hub.requests.clear()
    assert download(options).num_fetched == 0
    assert hub.downloads("*") == []
    assert [item.state for item in make_plan(options).items] == [State.COMPLETE] * 4


@pytest.mark.parametrize("path", ["../out.txt", "/etc/out.txt", "a/../../out.txt"])
def test_download_path_that_leaves_the_folder_is_refused(
    options: DownloadOptions, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    files = [huggingface_hub.hf_api.RepoFile(path=path, size=1, oid="a" * 40)]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_tree", lambda *_, **__: files)
    with raises(DataError, f"'{path}'", location=REPO):
        download(options)


def test_download_names_of_its_own_in_the_repository_are_left_out(
    options: DownloadOptions, hub: Hub, source: Path
) -> None:
    for name in (RECEIPT_NAME, LOCK_NAME, f"{FIRST}.partial"):
        (source / name).write_bytes(b"of the repository")
    download(options)
    assert set(content(options.output)) == set(FILES)
    assert json.loads((options.output / RECEIPT_NAME).read_bytes())["repo"] == REPO


def test_download_file_beyond_what_http_serves_is_refused_with_another_way(
    options: DownloadOptions, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preprocessing.hub.transfer.MAX_HTTP_DOWNLOAD_SIZE", NUM_BYTES - 1)
    with raises(DataError, SMALL, location=SMALL, remedy="hf download"):
        download(options)
    assert hub.downloads("*") == []


def test_make_plan_tells_each_files_state_and_writes_nothing(options: DownloadOptions, hub: Hub, source: Path) -> None:
    assert [item.state for item in make_plan(options).items] == [State.MISSING] * 4
    assert make_plan(options).fetch_bytes == 4 * NUM_BYTES
    assert not options.output.exists()
    download(replace(options, include=[SMALL, FIRST]))
    (options.output / FIRST).write_bytes(b"damaged")
    shutil.copyfile(source / SECOND, options.output / SECOND)
    (options.output / f"{VAL}.partial").write_bytes(bytes(30_000))
    before = content(options.output)
    plan = make_plan(options)
    assert [(item.file.path, item.state, item.fetch_bytes) for item in plan.items] == [
        (SMALL, State.COMPLETE, 0),
        (FIRST, State.DAMAGED, NUM_BYTES),
        (SECOND, State.UNCHECKED, 0),
        (VAL, State.PARTIAL, 20_000),
    ]
    assert make_plan(replace(options, verify=True)).items[0].state == State.UNCHECKED
    (options.output / f"{FIRST}.partial").write_bytes(bytes(NUM_BYTES + 1))
    assert make_plan(options).items[1].fetch_bytes == NUM_BYTES
    (options.output / f"{FIRST}.partial").unlink()
    assert content(options.output) == before


def test_download_meter_ends_at_its_total_whatever_was_fetched_twice(
    options: DownloadOptions, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(library, "Meter", lambda *arguments: made.append(Meter(*arguments)) or made[-1])
    (options.output / "train").mkdir(parents=True)
    (options.output / f"{FIRST}.partial").write_bytes(bytes(30_000))  # wrong, so dropped at the end
    hub.faults += [
        Fault(f"/cdn/*/{SECOND}", cut_after=20_500),
        Fault(f"/cdn/*/{SECOND}", no_range=True),
        Fault(f"/cdn/*/{VAL}", flip_at=0),
    ]
    download(options)
    bar = made[-1].bar
    assert bar.n == bar.total == 3 * NUM_BYTES + NUM_BYTES - 30_000


def test_huggingface_hub_alone_neither_resumes_a_failed_file_nor_checks_its_content(
    options: DownloadOptions, hub: Hub, source: Path
) -> None:
    """The reason for a download of our own (decision 0010). When this fails, the library may be able to replace it."""
    fetch = partial(
        huggingface_hub.hf_hub_download,
        REPO,
        FIRST,
        repo_type="dataset",
        local_dir=options.output,
        endpoint=hub.endpoint,
    )
    hub.faults += [Fault("/cdn/*", cut_after=20_500), Fault("/cdn/*", status=404)]
    with pytest.raises(HfHubHTTPError):
        fetch()
    hub.requests.clear()
    hub.faults.append(Fault("/cdn/*", flip_at=40_000))
    fetch()
    assert hub.downloads("*") == [None]
    assert (options.output / FIRST).read_bytes() != (source / FIRST).read_bytes()


def test_in_parallel_first_error_ends_the_others() -> None:
    ended: list[int] = []
    began = threading.Event()

    def work(number: int) -> None:
        if number == 0:
            began.wait(60)
            raise DataError("the first")
        began.set()
        try:
            meter.wait(60)
        except Stopped:
            ended.append(number)
            raise

    with Meter("", 1) as meter, raises(DataError, "the first"):
        run_in_threads(work, range(5), 2, lambda number, result: None, meter)
    assert 1 in ended
    assert set(ended) <= {1, 2}  # 2 where it was taken up before the error was seen; the rest never began
