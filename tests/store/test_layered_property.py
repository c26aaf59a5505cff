"""A layered store answers as a dict does, whatever is called."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.store.layered_kit import applied, reopened
from tests.store.store_kit import BASE_SALT, SIZES, based, batch_of, layered, rows_of
from torchrec_turbossd.store import LayeredRowStore, clone_directory

steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.lists(st.integers(0, 1100), min_size=1, max_size=60)),
        st.tuples(st.just("read"), st.lists(st.integers(0, 1200), max_size=60)),
        st.tuples(st.just("scan"), st.lists(st.integers(1, 1000), min_size=2, max_size=2)),
        st.tuples(st.sampled_from(["flush", "reopen", "replay", "apply", "copy", "clone"]), st.just([])),
    ),
    min_size=2,
    max_size=25,
)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(base=st.sets(st.integers(0, 999), max_size=300), dense=st.booleans(), actions=steps)
def test_any_calls_answer_as_a_dict_does(
    tmp_path: Path, base: set[int], dense: bool, actions: list[tuple[str, list[int]]]
) -> None:
    root = tmp_path / str(len(list(tmp_path.iterdir())))
    ids = torch.arange(len(base)) if dense else torch.tensor(sorted(base), dtype=torch.int64)
    oracle = dict.fromkeys(ids.tolist(), BASE_SALT)
    store = layered(based(root, ids))
    for salt, (action, given_ids) in enumerate(actions):
        if action == "write":
            store.write(batch_of(given_ids, salt=salt))
            oracle.update(dict.fromkeys(given_ids, salt))
        elif action == "read":
            index = torch.tensor(given_ids, dtype=torch.int64)
            for table, width in SIZES.items():
                rows, found = store.read(table, index)
                assert found.tolist() == [i in oracle for i in given_ids]
                for i, row in zip(given_ids, rows, strict=True):
                    want = rows_of(torch.tensor([i]), width, oracle[i])[0] if i in oracle else torch.zeros_like(row)
                    assert torch.equal(row, want)
        elif action == "scan":
            windows = list(store.scan("users", *given_ids))
            assert all(0 < part.numel() <= given_ids[1] for part, _ in windows)
            got = torch.cat([part for part, _ in windows] or [ids[:0]])
            assert got.tolist() == sorted(i for i in oracle if i >= given_ids[0])
            for part, rows in windows:
                assert torch.equal(rows, torch.cat([rows_of(i[None], 12, oracle[int(i)]) for i in part]))
        elif action == "apply":
            applied(store)
        elif action == "flush":
            store.flush()
        else:
            store = moved(store, action, root.with_name(f"{root.name}-{salt}"))
    store.discard()


def moved(store: LayeredRowStore, action: str, path: Path) -> LayeredRowStore:
    """The same rows in a store that was opened again, or in a copy of it."""
    if action == "replay":
        return reopened(store)
    if action == "copy":
        store.checkpoint(path)
        store.discard()
        return layered(path, create=False)
    store.close()
    if action == "clone":
        clone_directory(store.path, path)
        return layered(path, create=False)
    return layered(store.path, create=False)
