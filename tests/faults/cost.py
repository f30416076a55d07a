"""What the checks of a run cost, in CPU time on the phantom of `make train`: cost.py."""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import data  # noqa: E402
import files  # noqa: E402
import phantom  # noqa: E402
import train  # noqa: E402

STUDIES = 3


def cost(title: str, call: Callable[[], object], per: int = 1, repeats: int = 5) -> None:
    """Print milliseconds of CPU time per call and item."""
    start = time.process_time()
    for _ in range(repeats):
        call()
    print(f"{1000 * (time.process_time() - start) / repeats / per:8.2f} ms  {title}", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        c = train.parse_config(["--phantoms", str(STUDIES)])
        root = Path("studies")
        phantom.write_petct(root, STUDIES, spacing=c.spacing)
        cases = data.build_cache(data.find_petct(root), c.preprocessing, "cache", 1)
        sources = [path for case in cases for path in case.case.files()]
        weights = train.averaged(train.build_model(c))
        log, row = files.Log(Path("log")), {f"part{i}": 0.1 for i in range(12)}
        n = len(cases)
        cost("to verify a cache entry, per study", lambda: [
            files.unseal(case.folder) for case in cases], n)  # fmt: skip
        cost("checksums of its files, once in preprocessing", lambda: list(
            map(files.checksum, sources)), n)  # fmt: skip
        cost("to verify the phantom's files, per study", lambda: phantom.write_petct(
            root, STUDIES, spacing=c.spacing), n)  # fmt: skip
        cost("finite weights, per checkpoint", lambda: all(t.isfinite().all() for t in weights))
        cost("a row of the log, per step", lambda: log.add(row), repeats=200)


if __name__ == "__main__":
    main()
