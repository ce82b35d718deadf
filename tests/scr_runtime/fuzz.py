"""Damages predictor folders at random: each is refused with a documented error, or is the exact predictor.

Where a value was changed together with the checksum, which no accident does, what is loaded is what is written there.

python -m tests.scr_runtime.fuzz --cases 6000 --seed 0
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from scr_runtime import errors, load_predictor
from tests.scr_runtime.folders import Written, flipped, places, replaced, resident

MOST_BYTES = 100 * 2**20
FILES = ("config.json", "model.safetensors", "golden.safetensors")
_ODD: list[Any] = [
    None, True, 0, -1, 2.5, 1e308, 10**400, 2**63, "", "5", "\ud800", "x" * 10_000, [], {}, [[[]]], {"a": {"b": 1}},
    float("nan"), float("inf"),
]  # fmt: skip
_HEADERS: list[Any] = [
    {"shape": [2**40], "data_offsets": [0, 2**42]}, {"shape": [2**62, 2**62]}, {"shape": [10**400]}, {"shape": [-1]},
    {"dtype": "F31"}, {"dtype": None}, {"dtype": "F16"}, {"data_offsets": [8, 0]}, {"data_offsets": [0, 4]}, {},
]  # fmt: skip


class Fuzz:
    """One folder that is damaged again and again.

    Attributes:
        written: The folder as it should be.
    """

    def __init__(self, place: Path, seed: int) -> None:
        self.written = Written(place / "p")
        self.golden = (self.written.folder / "golden.safetensors").read_bytes()
        self.rng = random.Random(seed)
        self.damages: dict[str, Callable[[], str]] = {
            "flip": self._flip, "cut": self._cut, "added bytes": self._add, "no UTF-8": self._not_utf8,
            "value": self._value, "key deleted": self._delete, "key added": self._new_key, "key twice": self._twice,
            "deep": self._deep, "tensor": self._tensor, "header": self._header, "link": self._link,
            "missing": self._missing,
        }  # fmt: skip

    def case(self) -> tuple[str, str]:
        """Damages the folder, reads it, and puts it back.

        Returns:
            The kind of damage, and ``"refused"``, ``"exact"`` or ``"as written"``.

        Raises:
            AssertionError: If it is neither, or too much memory was taken.
        """
        kind = self.rng.choice(list(self.damages))
        self.signed = False
        what = self.damages[kind]()
        before = resident()
        try:
            predictor = load_predictor(self.written.folder, verify=True)
        except errors.PredictorError as error:
            names = (str(self.written.folder), *FILES)
            assert any(name in str(error) for name in names), f"{kind}, {what}: names no file: {error}"
            found = "refused"
        except Exception as error:
            raise AssertionError(f"{kind}, {what}: {type(error).__name__}: {error}") from error
        else:
            found = "exact" if self.written.is_same(predictor) else "as written"
            if found != "exact":
                assert self.signed and kind in ("value", "key added", "key deleted"), f"{kind}, {what}: another one"
                assert predictor.info == json.loads((self.written.folder / "config.json").read_text()), what
                self.written.is_usable(predictor)
        finally:
            self._restore()
        taken = resident() - before
        assert taken <= MOST_BYTES, f"{kind}, {what}: took {taken / 2**20:.0f} MB"
        return kind, found

    def _restore(self) -> None:
        golden = self.written.folder / "golden.safetensors"
        golden.unlink(missing_ok=True)
        golden.write_bytes(self.golden)
        self.written.restore()

    def _file(self) -> tuple[Path, bytes]:
        path = self.written.folder / self.rng.choice(FILES)
        return path, path.read_bytes()

    def _flip(self) -> str:
        path, content = self._file()
        bit = self.rng.randrange(8 * len(content))
        path.write_bytes(flipped(content, bit))
        return f"{path.name} bit {bit}"

    def _cut(self) -> str:
        path, content = self._file()
        size = self.rng.randrange(len(content))
        path.write_bytes(content[:size])
        return f"{path.name} at {size}"

    def _add(self) -> str:
        path, content = self._file()
        place = self.rng.randrange(len(content) + 1)
        path.write_bytes(content[:place] + self.rng.randbytes(self.rng.randint(1, 9)) + content[place:])
        return f"{path.name} at {place}"

    def _not_utf8(self) -> str:
        path, content = self.written.folder / "config.json", self.written.config
        place = self.rng.randrange(len(content))
        path.write_bytes(
            content[:place] + self.rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x80"]) + content[place:]
        )
        return f"at {place}"

    def _write(self, record: Any) -> None:
        """Mostly with the checksum that belongs to it, so that the checks of values are what refuses it."""
        self.signed = self.rng.random() < 0.8
        if self.signed:
            self.written.write_record(record)
        else:
            (self.written.folder / "config.json").write_text(json.dumps(record))

    def _value(self) -> str:
        place = self.rng.choice([one for one in places(self.written.record) if one != ("checksum",)])
        new = self.rng.choice(_ODD)
        self._write(replaced(self.written.record, place, new))
        return f"{place} is {new!r:.40}"

    def _objects(self) -> list[tuple[Any, ...]]:
        return [(), ("network",), ("scr",), ("model",), ("metrics",), ("provenance",)]

    def _inside(self, place: tuple[Any, ...]) -> dict[str, Any]:
        return dict(self.written.record[place[0]] if place else self.written.record)

    def _delete(self) -> str:
        place = self.rng.choice(self._objects())
        values = self._inside(place)
        key = self.rng.choice(list(values))
        del values[key]
        self._write(replaced(self.written.record, place, values))
        return f"{place} {key}"

    def _new_key(self) -> str:
        place = self.rng.choice(self._objects())
        key = self.rng.choice(["new", "", "num_sauces", "checksums", "\u0000", "x" * 500])
        self._write(replaced(self.written.record, place, {**self._inside(place), key: self.rng.choice(_ODD)}))
        return f"{place} {key!r:.40}"

    def _twice(self) -> str:
        key = self.rng.choice(list(self.written.record))
        text = json.dumps({key: self.rng.choice(_ODD)})[:-1] + ", " + self.written.config.decode().strip()[1:]
        (self.written.folder / "config.json").write_text(text, errors="surrogatepass")
        return key

    def _deep(self) -> str:
        depth = self.rng.choice([33, 100, 1000, 100_000])
        opened, closed = self.rng.choice([("[", "]"), ('{"a":', "}")])
        text = opened * depth + "1" + closed * depth
        whole = self.rng.random() < 0.5
        body = text if whole else self.written.config.decode().strip()[:-1] + f', "more": {text}}}'
        (self.written.folder / "config.json").write_text(body)
        return f"{depth} {opened} {'alone' if whole else 'in a key'}"

    def _seal(self, name: str, content: bytes) -> None:
        """Writes a file that config.json knows the sha256 of."""
        (self.written.folder / name).write_bytes(content)
        key = "weights_sha256" if name.startswith("model") else "golden_sha256"
        self.written.write_record(self.written.record | {key: hashlib.sha256(content).hexdigest()})

    def _tensor(self) -> str:
        name = self.rng.choice(FILES[1:])
        tensors = load_tensors((self.written.folder / name).read_bytes())
        key = self.rng.choice(list(tensors))
        changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "dtype": lambda value: value.to(torch.bfloat16), "integer": lambda value: value.to(torch.int8),
            "longer": lambda value: torch.cat([value.reshape(-1), value.reshape(-1)]),
            "flat": lambda value: value.reshape(-1)[None, None], "empty": lambda value: value.reshape(-1)[:0],
            "NaN": lambda value: torch.full_like(value.float(), float("nan")),
            "infinite": lambda value: torch.full_like(value.float(), float("inf")),
            "negative": lambda value: -value - 1,
        }  # fmt: skip
        change = self.rng.choice([*changes, "gone", "new"])
        if change == "gone":
            del tensors[key]
        elif change == "new":
            tensors["more"] = torch.zeros(3)
        else:
            changed = changes[change](tensors[key]).contiguous()
            if change == "negative" and name.startswith("model") and not key.endswith("_std"):
                changed = changed.to(torch.float64)  # other weights of the right type are no damage
            tensors[key] = changed
        self._seal(name, save_tensors(tensors))
        return f"{name} {key} {change}"

    def _header(self) -> str:
        name = self.rng.choice(FILES[1:])
        content = (self.written.folder / name).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        key = self.rng.choice(list(header))
        change = self.rng.choice([*_HEADERS, 2**42, 2**64 - 1, 0])
        if isinstance(change, int):
            content = struct.pack("<Q", change) + content[8:]
        else:
            header[key] = {**header[key], **change} if change else {}
            text = json.dumps(header).encode()
            content = struct.pack("<Q", len(text)) + text + content[8 + length :]
        self._seal(name, content)
        return f"{name} {key} {change!r:.60}"

    def _link(self) -> str:
        path, _ = self._file()
        target = self.rng.choice(
            ["nowhere", path.name, "/dev/zero", "/dev/null", "/", "/proc/self/mem", "config.json"]
        )
        path.unlink()
        path.symlink_to(target)
        return f"{path.name} -> {target}"

    def _missing(self) -> str:
        path, _ = self._file()
        path.unlink()
        return path.name


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the cases and prints a table; the first wrong one ends it with its traceback."""
    parser = argparse.ArgumentParser("python -m tests.scr_runtime.fuzz", description="Damages predictor folders.")
    parser.add_argument("--cases", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    counts: Counter[tuple[str, str]] = Counter()
    start, before = time.monotonic(), resident()
    with tempfile.TemporaryDirectory() as place:
        fuzz = Fuzz(Path(place), options.seed)
        for _ in range(options.cases):
            counts[fuzz.case()] += 1
        for kind in fuzz.damages:
            shown = (f"{found} {counts[kind, found]:5,}" for found in ("refused", "exact", "as written"))
            print(f"{kind:12} {'  '.join(shown)}")
    grown, seconds = (resident() - before) / 2**20, time.monotonic() - start
    print(f"{options.cases:,} cases in {seconds:.0f} s, memory grew by {grown:.1f} MB in all: none wrong")
    return 0


if __name__ == "__main__":
    sys.exit(main())
