"""Kills `python train.py` at random moments, and looks at what is there after each.

python -m benchmarks.kills --kills 100 --seed 0

A small chain on the embedded world: the harvest is made once, so that the kills fall into the fit, the export, the
comparison, and MLflow's writes between them. Each process is killed by SIGKILL at a moment between its start and the
time that an undisturbed run takes, and the same command is run again. After each kill and each end the folder is
checked:

    links      `latest`, and the predictor's link, point to a run that is complete, and whose predictor loads
    runs       a run that says it is complete has its predictor, its reports and its configuration, byte for byte those
               of an undisturbed run
    MLflow     a run that is FINISHED has the tag of complete runs and one metric per epoch, no more; the runs that are
               complete are as many as the commands that ended well
    harvest    no byte of it has changed

A server process imports everything once and forks a process for each command: importing takes longer than the chain
does. It computes nothing itself: a process that is forked behind torch's first product has no thread pool.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from multiprocessing.process import BaseProcess
from pathlib import Path

PARSER = argparse.ArgumentParser("python -m benchmarks.kills", description="Kills train.py at random moments.")
PARSER.add_argument("--kills", type=int, default=100, help="how many (default: 100)")
PARSER.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
if __name__ == "__main__":
    PARSER.parse_args()  # before the imports below, which take seconds

import torch
from tqdm import tqdm

import train
from scr_runtime import load_predictor

CHAIN = (
    "model.device=cpu",
    "harvest.samples=40",
    "harvest.validation=10",
    "harvest.test=10",
    "harvest.shard_size=20",
    "data.world.train=60",
    "data.world.val=8",
    "trainer.max_epochs=4",
    "evaluation.images=4",
    "evaluation.bootstrap=50",
    "evaluation.latency_repeats=1",
)
EPOCHS = 4
_IMPORTED = ["train", "pipeline.checks", "pipeline.runs", "pipeline.sweep"]


class Folder:
    """Where the chain runs, and what an undisturbed run left there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fits = root / "runs" / "fits" / "scene-llava"
        self.finished = 0
        self.problems: list[str] = []
        self._harvest: dict[str, str] = {}
        self._predictor = ""

    def remember(self) -> None:
        """Takes the state behind an undisturbed run as what has to be there."""
        self._harvest = self._checksums(self.root / "runs" / "harvest")
        self._predictor = self._checksum(self.fits / "latest" / "predictor" / "model.safetensors")

    def check(self) -> None:
        """Looks at everything; problems are collected."""
        try:
            self._check_links()
            for run in self.runs():
                self._check_run(run)
            self._check_mlflow()
            if self._checksums(self.root / "runs" / "harvest") != self._harvest:
                self.problems.append("the harvest has changed")
        except Exception as error:
            self.problems.append(f"{error!r}")

    def last_lines(self) -> str:
        """What the command printed last."""
        return (self.root / "log.txt").read_text(errors="replace")[-2000:]

    def runs(self) -> list[Path]:
        """The run folders, links left out."""
        return [path for path in self.fits.iterdir() if not path.is_symlink() and not path.name.startswith(".")]

    def _check_links(self) -> None:
        latest = (self.fits / "latest").resolve(strict=True)
        if not json.loads((latest / "run.json").read_text()).get("complete"):
            self.problems.append(f"latest points to {latest.name}, which is not complete")
        load_predictor(self.root / "runs" / "predictors" / "scene-llava")

    def _check_run(self, run: Path) -> None:
        record = run / "run.json"
        if not record.exists() or not json.loads(record.read_text()).get("complete"):
            return
        if self._checksum(run / "predictor" / "model.safetensors") != self._predictor:
            self.problems.append(f"{run.name}: another predictor than that of an undisturbed run")
        load_predictor(run / "predictor")
        for name in ("evaluation.json", "evaluation.md", "evaluation.html", "reliability.png", "maps.png"):
            if not (run / "reports" / name).stat().st_size:
                self.problems.append(f"{run.name}: {name} is empty")

    def _check_mlflow(self) -> None:
        with closing(sqlite3.connect(self.root / "runs" / "mlflow.db")) as database:
            rows = database.execute("select run_uuid, status from runs").fetchall()
            tagged = {row[0] for row in database.execute("select run_uuid from tags where key='config.fingerprint'")}
            steps = dict(
                database.execute("select run_uuid, count(*) from metrics where key='val/mass' group by run_uuid")
            )
        complete = [run for run, status in rows if status == "FINISHED"]
        for run in complete:
            if run not in tagged:
                self.problems.append(f"MLflow run {run} is FINISHED without its last tag")
            if steps.get(run) != EPOCHS:
                self.problems.append(f"MLflow run {run} has {steps.get(run)} values of val/mass, not {EPOCHS}")
        on_disk = sum(json.loads((run / "run.json").read_text()).get("complete") is True for run in self.runs())
        if not self.finished <= on_disk <= len(complete) <= on_disk + 1:
            self.problems.append(
                f"{self.finished} commands ended well, {on_disk} folders and {len(complete)} MLflow runs are complete"
            )

    @staticmethod
    def _checksum(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def _checksums(self, folder: Path) -> dict[str, str]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): self._checksum(path) for path in files}


def start(root: Path) -> BaseProcess:
    """Starts a process that runs the chain."""
    process = multiprocessing.get_context("forkserver").Process(target=_run_chain, args=(root,))
    process.start()
    return process


def _run_chain(root: Path) -> None:
    tqdm.set_lock(threading.RLock())  # its own lock is shared by forked processes, and stays locked if one is killed
    torch.set_num_threads(1)
    os.chdir(root)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.exit(train.main(CHAIN))


def wait(process: BaseProcess, seconds: float) -> int | None:
    """Waits for a process and returns its status; kills it when the time is over, and returns None then."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
    return None if process.exitcode == -signal.SIGKILL else process.exitcode


def main(argv: Sequence[str] | None = None) -> int:
    """Kills the chain so many times; returns 1 if anything was lost, doubled or half there."""
    options = PARSER.parse_args(argv)
    rng = random.Random(options.seed)
    os.environ["OMP_NUM_THREADS"] = "1"
    multiprocessing.set_forkserver_preload(_IMPORTED)
    with tempfile.TemporaryDirectory() as name:
        folder = Folder(Path(name))
        print("one undisturbed run that makes the harvest, one that has it ...", flush=True)
        for _ in range(2):
            started = time.monotonic()
            if wait(start(folder.root), 1800) != 0:
                print(folder.last_lines())
                return 1
            folder.finished += 1
        seconds = time.monotonic() - started
        folder.remember()
        folder.check()
        kills = ended = 0
        with tqdm(total=options.kills, desc="kills", unit="kill") as progress:
            while kills < options.kills:
                known = len(folder.problems)
                status = wait(start(folder.root), rng.uniform(0, seconds))
                if status is None:
                    kills += 1
                    progress.update()
                elif status == 0:
                    ended += 1
                    folder.finished += 1
                else:
                    folder.problems.append(f"the command ended with {status}: {folder.last_lines()}")
                folder.check()
                for problem in folder.problems[known:]:
                    tqdm.write(problem)
        if wait(start(folder.root), 1800) == 0:
            ended += 1
            folder.finished += 1
        else:
            folder.problems.append(f"the last command did not end well: {folder.last_lines()}")
        folder.check()
    found = len(folder.problems)
    print(f"{kills} kills of a chain of {seconds:.0f} s; {ended} commands came to their end; {found} problems")
    return 1 if folder.problems else 0


if __name__ == "__main__":
    sys.exit(main())
