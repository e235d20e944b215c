"""What it takes to open a set of 10^12 tokens and to read samples anywhere in it. Takes 2 GB of disk: .bin is a hole.

python -m tests.data.scale
python -m tests.data.scale --documents 1000000      10^10 tokens
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from longred_megatron.data.indexed import CHECKED_AT_ONCE, INDEX_HEADER, INDEX_MAGIC, INDEX_VERSION, IndexedDocuments
from longred_megatron.data.interleaving import Interleaving
from longred_megatron.data.packing import PackedSequences, best_fit
from longred_megatron.data.sequences import IndexedSequences

TOKENS = 10_000  # of a document, on average
WINDOW = 8192
UINT16 = 8  # Megatron's code


def write_set(prefix: Path, num_documents: int) -> int:
    """Documents of 5,000 and 15,000 tokens in turn, all of them 0, an even number; returns the number of tokens."""
    header = (
        INDEX_MAGIC + INDEX_HEADER.pack(INDEX_VERSION, UINT16, num_documents, num_documents + 1)[len(INDEX_MAGIC) :]
    )
    lengths = np.array([TOKENS // 2, TOKENS * 3 // 2], dtype=np.int32)
    before = np.array([0, TOKENS // 2], dtype=np.int64)
    with prefix.with_suffix(".idx").open("wb") as file:
        file.write(header)
        for part in _parts(num_documents):
            file.write(np.tile(lengths, len(part) // 2).tobytes())
        for part in _parts(num_documents):
            pairs = np.arange(part.start // 2, part.stop // 2, dtype=np.int64)
            file.write(((pairs[:, None] * 2 * TOKENS + before) * 2).tobytes())
        for part in _parts(num_documents):
            file.write(np.arange(part.start, part.stop, dtype=np.int64).tobytes())
        file.write(np.array([num_documents], dtype=np.int64).tobytes())
    with prefix.with_suffix(".bin").open("wb") as file:
        file.truncate(num_documents * TOKENS * 2)
    return num_documents * TOKENS


def _parts(size: int) -> list[range]:
    return [range(at, min(at + CHECKED_AT_ONCE, size)) for at in range(0, size, CHECKED_AT_ONCE)]


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10**8)
    number = parser.parse_args().documents // 2 * 2
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "set"
        print(f"{number:,} documents, {write_set(prefix, number):,} tokens")
        import megatron.core.datasets.indexed_dataset  # noqa: F401  takes seconds itself

        took, _ = seconds(lambda: IndexedDocuments(str(prefix)))
        print(f"open and check         {took:8.2f} s")
        for series in (IndexedSequences, PackedSequences):
            took, samples = seconds(lambda series=series: series(str(prefix), WINDOW, (1, 0)))
            print(f"{series.__name__:22} {took:8.2f} s")
            last = number * TOKENS // WINDOW - 3
            places = {"first": 0, "next": 1}
            if series is IndexedSequences:
                places |= {"middle": last // 2, "last": last}
            for name, place in places.items():
                took, _ = seconds(lambda place=place, samples=samples: samples[place])
                print(f"  {name:20} {took * 1e3:8.2f} ms")
    took, _ = seconds(lambda: Interleaving([0.7, 0.2, 0.1])[10**6])
    print(f"the set of sample 1,000,000 of a blend of three: {took:.2f} s")
    lengths = np.random.default_rng(1).lognormal(5.5, 1, 10**5).astype(int).clip(1, WINDOW)
    took, windows = seconds(lambda: best_fit(lengths.tolist(), WINDOW))
    print(f"best fit of {len(lengths):,} documents into {len(windows):,} windows: {took:.2f} s")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB, mapped files with it")


if __name__ == "__main__":
    main()
