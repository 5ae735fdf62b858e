"""What the tests of records share: three seeds run with the packed script, and a record of them."""

import functools
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import conftest

import records

SEEDS = (1, 2, 3)
# No search, no validation on the way.
QUICK = dict(VAL_LOSS_EVERY=0, PREQUANT_SLIDING=0, EVAL_STRIDE=32, SDCLIP_K=6, SDCLIP_K_EMBED=10)
NAME, DATE = "Toy_Run", "2026-01-31"


class Seeds(NamedTuple):
    """Where runs were made: a folder with logs/ and runs/, and the script that made them."""

    folder: Path
    script: Path

    def runs(self) -> list[str]:
        return [str(self.folder / "runs" / f"seed{seed}") for seed in SEEDS]


@functools.cache
def packed_script(folder: Path) -> Path:
    """Return the submission form of train_gpt.py, made once in a folder."""
    out = folder / "train_gpt.py"
    assert records.main(["script", "--out", str(out)]) == 0
    return out


def finished_seeds(settings: dict, folder: Path, nursery) -> Seeds:
    """Run the packed script once per seed; read-only."""
    packed = packed_script(folder)
    cap = packed.stat().st_size + conftest.TINY_ARTIFACT_BYTES
    for seed in SEEDS:
        env = {**settings, **QUICK, "ARTIFACT_MAX_BYTES": cap, "SEED": seed,
               "RUN_ID": f"seed{seed}"}
        done = nursery.run(env, folder, script=packed)
        assert done.rc == 0, done.stderr
    return Seeds(folder, packed)


@functools.cache
def made_record(seeds: Seeds, *more: str) -> Path:
    """Return the folder that `pack` makes of the seeds; read-only."""
    out = seeds.folder / f"records{os.getpid()}.{len(list(seeds.folder.iterdir()))}"
    assert pack(seeds, out, *more) == 0
    return out / "track_non_record_16mb" / f"{DATE}_{NAME}"


def pack(seeds: Seeds, out: Path, *more: str, runs=None) -> int:
    return records.main(["pack", *(runs or seeds.runs()), "--name", NAME, "--author", "A. Author",
                         "--github-id", "author", "--blurb", "A toy.", "--date", DATE,
                         "--script", str(seeds.script), "--out", str(out), *more])


def copy_record(record: Path, to: Path, track: str = "non_record_16mb") -> Path:
    """Return a copy of a record that may be spoilt, in a track."""
    return Path(shutil.copytree(record, to / f"track_{track}" / record.name))


def edit(path: Path, old: str, new: str) -> None:
    """Replace text that must be there."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
