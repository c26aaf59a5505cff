"""What waits for uses in flight, against a plain model: an item matures when every use begun before it has ended."""

from __future__ import annotations

import random

import pytest

from torchrec_turbossd.tbe.epochs import Epochs


@pytest.mark.parametrize("seed", range(20))
def test_items_mature_when_the_uses_before_them_have_ended(seed: int) -> None:
    chooser, epochs = random.Random(seed), Epochs[int]()
    active: list[tuple[int, int]] = []
    waiting: dict[int, set[int]] = {}
    since: dict[int, list[int]] = {}
    for step in range(300):
        act = chooser.random()
        if act < 0.35:
            active.append((step, epochs.enter()))
            since[step] = []
        elif act < 0.65 and active:
            user, epoch = active.pop(chooser.randrange(len(active)))
            assert [i for i in epochs.since(epoch) if i in waiting] == since.pop(user)
            epochs.leave(epoch)
            for users in waiting.values():
                users.discard(user)
        elif act < 0.8:
            epochs.retire(step)
            waiting[step] = {user for user, _ in active}
            for user, _ in active:
                since[user].append(step)
        else:
            # In order: one that could go is held up by one before it that cannot.
            wanted = []
            for item in list(waiting):
                if waiting[item]:
                    break
                wanted.append(item)
                del waiting[item]
            found = epochs.matured()
            assert found == wanted
            for items in since.values():
                assert not set(items) & set(found), "matured under a use that began before"
        assert epochs.idle == (not active)
