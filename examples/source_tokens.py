"""Input that every machine has: the tokens of Python's own standard library, as rows of embedding tables."""

from __future__ import annotations

import hashlib
import re
import sysconfig
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor

CLASSES = 256
"""What is predicted: one of the most frequent tokens, or (class 0) any other."""

TABLES = {"tokens": (200_000, 16), "pairs": (2_000_000, 16), "triples": (4_000_000, 16), "layout": (256, 16)}
"""Rows and columns of each table."""


@dataclass(frozen=True)
class Feature:
    """A bag of rows of `table`: those of the tokens `nearest` to `furthest` steps before the last known one."""

    name: str
    table: str
    nearest: int
    furthest: int

    @property
    def window(self) -> int:
        """Rows of one bag."""
        return self.furthest - self.nearest + 1


FEATURES = (
    Feature("last_token", "tokens", 0, 0),
    Feature("recent_tokens", "tokens", 1, 8),
    Feature("last_pair", "pairs", 0, 0),
    Feature("recent_pairs", "pairs", 1, 4),
    Feature("last_triple", "triples", 0, 0),
    Feature("recent_triples", "triples", 1, 4),
    Feature("layout", "layout", 0, 0),
)
"""In the order of their tables, as TorchRec's sharded modules and FBGEMM's kernels have them."""

_CONTEXT = max(feature.furthest for feature in FEATURES)

_TOKEN = re.compile(r"[A-Za-z_]\w*|\d+|[^\w\s]")
_NOT_STANDARD = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_END_OF_LINE = "\n"
_LEVELS, _COLUMNS = 16, 16

Ids = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


def table_configs() -> list[EmbeddingBagConfig]:
    """The tables as TorchRec has them declared."""
    return [
        EmbeddingBagConfig(
            name=table,
            num_embeddings=rows,
            embedding_dim=dim,
            feature_names=[feature.name for feature in FEATURES if feature.table == table],
        )
        for table, (rows, dim) in TABLES.items()
    ]


@dataclass(frozen=True)
class Corpus:
    """A long run of tokens.

    Attributes:
        rows: for each table, the row that goes with each token: [N] int64. An n-gram's row goes with its last token.
        classes: the class of each token: [N] int64.
    """

    rows: dict[str, Ids]
    classes: Ids

    def __len__(self) -> int:
        return int(self.classes.size)

    def save(self, directory: Path) -> None:
        """Write the arrays to `directory`, for other processes to map."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, values in {**self.rows, "classes": self.classes}.items():
            np.save(directory / f"{name}.npy", values)

    @classmethod
    def load(cls, directory: Path) -> Corpus:
        """Map what `save` wrote."""
        found = {path.stem: np.load(path, mmap_mode="r") for path in directory.glob("*.npy")}
        return cls({table: found[table] for table in TABLES}, found["classes"])

    def counts(self, table: str) -> Ids:
        """How often each row of `table` goes with a token: [rows] int64."""
        return np.bincount(self.rows[table], minlength=TABLES[table][0])


def read_standard_library() -> Corpus:
    """Read and hash the standard library's source files, in the order of their names. Takes a few seconds."""
    vocabulary: dict[str, int] = {}
    tokens, layout = array("q"), array("q")
    for path in _source_files():
        for level, line in _lines(path.read_text(encoding="utf-8", errors="replace")):
            tokens.extend([vocabulary.setdefault(token, len(vocabulary)) for token in line])
            layout.extend([level * _COLUMNS + min(column, _COLUMNS - 1) for column in range(len(line))])
    numbers = np.frombuffer(tokens, dtype=np.int64)
    single = np.array([_hash(token) for token in vocabulary], dtype=np.uint64)[numbers]
    pairs = _followed_by(single, single)
    triples = _followed_by(pairs, single)
    rows = {"layout": np.frombuffer(layout, dtype=np.int64)}
    for table, hashes in (("tokens", single), ("pairs", pairs), ("triples", triples)):
        rows[table] = (hashes % np.uint64(TABLES[table][0])).astype(np.int64)
    return Corpus(rows, _classes(numbers, len(vocabulary)))


def _source_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(p for p in root.rglob("*.py") if not _NOT_STANDARD & set(p.relative_to(root).parts))


def _lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """Indentation level and tokens of each line that is not empty."""
    for line in text.splitlines():
        found = _TOKEN.findall(line)
        if found:
            spaces = len(line) - len(line.lstrip())
            yield min(spaces // 4, _LEVELS - 1), [*found, _END_OF_LINE]


def _hash(token: str) -> int:
    """64 bits of a token, the same in every process; Python's own `hash` is not."""
    return int.from_bytes(hashlib.blake2b(token.encode(), digest_size=8).digest(), "little")


def _followed_by(before: Hashes, single: Hashes) -> Hashes:
    """The hash of each token together with what ended just before it.

    The multiplications and shifts are the finaliser of splitmix64 (S. Vigna, public domain, 2015).
    """
    mixed = np.roll(before, 1) * np.uint64(0x9E3779B97F4A7C15) + single
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: Hashes = mixed ^ (mixed >> np.uint64(31))
    return result


def _classes(numbers: Ids, vocabulary: int) -> Ids:
    """The most frequent tokens by rank from 1, all others 0."""
    frequent = Counter(dict(enumerate(np.bincount(numbers, minlength=vocabulary).tolist()))).most_common(CLASSES - 1)
    of_token = np.zeros(vocabulary, dtype=np.int64)
    for rank, (token, _) in enumerate(frequent, 1):
        of_token[token] = rank
    classes: Ids = of_token[numbers]
    return classes


class SampleStream:
    """Samples of a corpus in random order, none twice before all were used: what came before, and the next token.

    Args:
        corpus: the tokens.
        seed: of the order.
    """

    def __init__(self, corpus: Corpus, seed: int) -> None:
        self.corpus = corpus
        places = np.arange(_CONTEXT, len(corpus) - 1)
        self._order = np.random.default_rng(seed).permutation(places)

    def __len__(self) -> int:
        return int(self._order.size)

    def places(self, batch: int, batch_size: int) -> Ids:
        """Where the last known tokens of batch `batch` stand; negative numbers count from the end of the order."""
        taken: Ids = self._order.take(np.arange(batch * batch_size, (batch + 1) * batch_size), mode="wrap")
        return taken

    def features(self, places: Ids) -> KeyedJaggedTensor:
        """What stands before and at `places` [B], as bags of rows: [features x B]."""
        values = [self.rows(feature, places).reshape(-1) for feature in FEATURES]
        lengths = np.repeat([feature.window for feature in FEATURES], places.size)
        return KeyedJaggedTensor(
            keys=[feature.name for feature in FEATURES],
            values=torch.from_numpy(np.concatenate(values)),
            lengths=torch.from_numpy(lengths),
        )

    def rows(self, feature: Feature, places: Ids) -> Ids:
        """The rows of each bag of one feature: [B, window] int64."""
        found: Ids = self.corpus.rows[feature.table][places[:, None] - np.arange(feature.nearest, feature.furthest + 1)]
        return found

    def labels(self, places: Ids) -> Tensor:
        """The class of the token after each place: [B] int64."""
        return torch.from_numpy(self.corpus.classes[places + 1])

    def used_rows(self, table: str, batches: Sequence[int], batch_size: int) -> Tensor:
        """Distinct rows of `table` in some batches, ascending: [N] int64."""
        features = [feature for feature in FEATURES if feature.table == table]
        places = np.concatenate([self.places(batch, batch_size) for batch in batches])
        rows = [self.rows(feature, places).reshape(-1) for feature in features]
        return torch.from_numpy(np.unique(np.concatenate(rows)))


__all__ = [
    "CLASSES",
    "FEATURES",
    "TABLES",
    "Corpus",
    "Feature",
    "SampleStream",
    "read_standard_library",
    "table_configs",
]
