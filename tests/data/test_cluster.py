"""The Ray engine: the driver's decisions against a stand-in, and real actors that are really killed."""

from __future__ import annotations

import ast
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.cluster import harvest_with_ray
from data.errors import ClusterError, DataError, HarvestMismatchError, PoisonShardsError, SettingsError
from data.images import CocoImages
from data.index import SPLITS
from data.plan import plan_shards
from data.settings import HarvestSettings
from data.shards import ShardReader
from tests.data import tiny, victim
from tests.data.tiny import contents

PROJECT = Path(__file__).parents[2]


def with_ray(workers: int = 1, max_retries: int = 2) -> HarvestSettings:
    return HarvestSettings(engine="ray", workers=workers, max_retries=max_retries)


def test_ray_is_not_imported_unless_it_is_asked_for():
    tree = ast.parse((PROJECT / "data" / "cluster.py").read_text())  # the only file that may: test_architecture.py
    at_import_time = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [node for node in at_import_time if "ray" in ast.unparse(node)]
    assert [node for node in ast.walk(tree) if ast.unparse(node) == "importlib.import_module('ray')"]


def test_without_ray_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ClusterError, match=r'pip install -c constraints\.txt -e "\.\[train,ray\]"'):
        harvest_with_ray(functools.partial(victim.prepared, tmp_path, tmp_path), with_ray())


def test_errors_cross_process_borders():
    import pickle

    for error in (
        HarvestMismatchError(Path("there"), {"seed": (0, 1)}),
        PoisonShardsError({"train-00000": "why"}, 3),
        DataError("plain"),
        SettingsError("both a DataError and a ValueError"),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and str(again) == str(error) and again.__dict__ == error.__dict__


# ---- a real cluster of two CPUs


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> CocoImages:
    return tiny.write_coco(tmp_path_factory.mktemp("coco") / "many", 90)


@pytest.fixture(scope="module")
def undisturbed(many: CocoImages, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    target = tmp_path_factory.mktemp("undisturbed")
    victim.run(many.images_dir.parent, target, seconds=0)
    return contents(target)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="Ray is an extra: pip install -e '.[ray]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    path = {"env_vars": {"PYTHONPATH": str(PROJECT)}}
    context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=path)
    yield context.address_info["gcs_address"]
    ray.shutdown()


def process_writing(target: Path, shard: str) -> int | None:
    """The process that is writing a shard at this moment."""
    for file in target.glob(f"{shard}.tar.tmp.*"):
        return int(file.suffix[1:])
    return None


def kill_the_writer_of(shard: str, target: Path) -> threading.Thread:
    """Kills, once, the first process that is seen writing a shard."""

    def watch() -> None:
        end = time.monotonic() + 600
        while time.monotonic() < end:
            if process := process_writing(target, shard):
                os.kill(process, signal.SIGKILL)
                return
            time.sleep(0.005)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_actors_are_killed_poison_is_reported_and_the_driver_starts_again(
    tmp_path: Path,
    many: CocoImages,
    undisturbed: dict[str, bytes],
    cluster: str,
    capsys: pytest.CaptureFixture[str],
):
    coco, target = many.images_dir.parent, tmp_path / "shards"
    poison = plan_shards(many.ids, victim.SETTINGS)[5]

    # a driver that dies: its shards stay
    driver = subprocess.Popen(
        [sys.executable, "-m", "tests.data.victim", "ray", str(coco), str(target)],
        cwd=PROJECT, env={**os.environ, "RAY_ADDRESS": cluster}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    end = time.monotonic() + 300  # every process imports torch, on however busy a machine
    while len(list(target.glob("*.json"))) < 4 and driver.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    driver.kill()
    errors = driver.communicate()[1].decode()
    assert driver.returncode == -signal.SIGKILL, errors[-3000:]
    kept = {file.name: file.stat().st_mtime_ns for file in target.glob("train-0000[01].tar")}
    assert kept and not (target / "index.json").exists()

    # an actor that is killed in the middle of a shard, and an image that kills every actor
    watcher = kill_the_writer_of("train-00010", target)
    with pytest.raises(PoisonShardsError) as caught:
        harvest_with_ray(
            functools.partial(victim.prepared, coco, target, 0.05, poison.image_ids[1]), with_ray(2, max_retries=1)
        )
    assert not watcher.is_alive()
    assert caught.value.failures == {poison.name: "its worker died (ActorDiedError)"}
    out = capsys.readouterr().out
    assert "shard train-00010 is tried again (attempt 2 of 2): its worker died" in out
    assert f"shard {poison.name} is skipped after 2 attempts" in out
    assert {file.name: file.stat().st_mtime_ns for file in target.glob("*.tar") if file.name in kept} == kept
    assert len(list(target.glob("*.tar"))) == victim.SHARDS - 1 and not (target / "index.json").exists()
    with pytest.raises(DataError, match=rf"1 of {victim.SHARDS} shards are missing: {poison.name}"):
        ShardReader(target, "train")

    # with the image repaired, this shard alone is made, by either engine
    summary = victim.run(coco, target)
    assert summary.shards_reused == victim.SHARDS - 1 and summary.finished
    assert contents(target) == undisturbed
    keys = [key for split in SPLITS for key in ShardReader(target, split).keys]
    assert len(keys) == len(set(keys)) == victim.SETTINGS.images


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
def test_actors_that_share_a_url_alone(tmp_path: Path, many: CocoImages, undisturbed: dict[str, bytes], cluster: str):
    coco, machines, url = many.images_dir.parent, tmp_path / "machines", f"file://{tmp_path}/bucket"
    summary = harvest_with_ray(functools.partial(victim.prepared_apart, coco, machines, url), with_ray(2))
    assert summary.finished and summary.shards == victim.SHARDS
    assert contents(tmp_path / "bucket") == undisturbed
    made = [{file.name for file in machine.glob("*.tar")} for machine in machines.iterdir()]
    assert sum(map(len, made)) == len(set().union(*made)) == victim.SHARDS  # none twice; a late actor may make none
    assert not any((machine / "index.json").exists() for machine in machines.iterdir())
    fetched = victim.run(coco, tmp_path / "training", output=url)
    assert fetched.shards_reused == victim.SHARDS and contents(tmp_path / "training") == undisturbed


def broken(coco: Path, target: Path) -> Any:
    raise RuntimeError("no such device")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
def test_workers_that_do_not_start_end_the_job(tmp_path: Path, many: CocoImages, cluster: str):
    with pytest.raises(ClusterError, match=r"workers do not start \(1 in a row failed\).*no such device"):
        harvest_with_ray(functools.partial(broken, tmp_path, tmp_path), with_ray(max_retries=0))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
def test_the_command_with_ray(tmp_path: Path, cluster: str, capsys: pytest.CaptureFixture[str]):
    from pipeline.commands import harvest as main

    images = tiny.write_coco(tmp_path / "coco", 12)
    for part in tiny.build_llava():  # not the shared one: saving changes a model's config
        part.save_pretrained(tmp_path / "tiny-llava")
    arguments = [
        f"runs_dir={tmp_path / 'runs'}", f"model.hub_id={tmp_path / 'tiny-llava'}", "model.device=cpu",
        "model.scr.edit_layers=[0,1]", "model.scr.attention_layers=[1,2]", "data=coco2014",
        f"data.root={tmp_path / 'coco'}", f"data.train_images={images.images_dir.name}",
        f"data.train_annotations={images.annotations_file.name}", "harvest.samples=4", "harvest.validation=2",
        "harvest.test=2", "harvest.tuning=0", "harvest.shard_size=2",
    ]  # fmt: skip
    copy = f"harvest.output=file://{tmp_path}/bucket"
    assert main([*arguments, "harvest.engine=ray", "harvest.workers=1", copy]) == 0
    assert "16 maps of 8 images (0 reused, 0 skipped)" in capsys.readouterr().out
    (harvested,) = (tmp_path / "runs" / "harvest").iterdir()
    assert contents(tmp_path / "bucket" / harvested.name) == contents(harvested)
    assert main(arguments) == 0  # what Ray made, the local engine takes over
    assert "(8 reused, 0 skipped)" in capsys.readouterr().out
    assert main([*arguments, "harvest.engine=ray", "harvest.seed=1", f"harvest.name={harvested.name}"]) == 1
    assert "seed: 0 -> 1" in capsys.readouterr().err
