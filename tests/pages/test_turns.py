"""Sessions that share one language model: first come, first served, and each is told how many are before it."""

from contextlib import nullcontext
from queue import Queue
from threading import Event, Lock, Thread
from unittest.mock import MagicMock

import pytest
import torch

from analysis.prompt.run import run_prompt
from pages.shared import live
from pages.shared.turns import Turns
from tests.helpers import PATIENCE
from trainer.checkpoint import Checkpoint


def started(*targets) -> list[Thread]:
    threads = [Thread(target=target, daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    return threads


def test_turns_are_taken_in_order_by_one_at_a_time_and_each_counts_down():
    turns, order, told = Turns(), [], {}

    def session(name: int, queued: Event):
        def wait(before: int) -> None:
            told.setdefault(name, []).append(before)
            queued.set()

        def run() -> None:
            with turns.take(wait):
                order.append(name)

        return run

    threads = []
    with turns.take(pytest.fail):
        for name in range(4):
            queued = Event()
            threads += started(session(name, queued))
            assert queued.wait(PATIENCE)
        assert not order
    for thread in threads:
        thread.join(PATIENCE)
    assert order == [0, 1, 2, 3]
    for name, counts in told.items():
        assert counts[0] == name + 1 and counts == sorted(counts, reverse=True), "it only comes nearer"


def test_who_gives_up_leaves_the_queue_and_a_run_that_fails_ends_its_turn():
    turns = Turns()

    def gone(before: int) -> None:
        raise ConnectionError

    with turns.take(pytest.fail), pytest.raises(ConnectionError), turns.take(gone):
        pytest.fail("it waits")
    with pytest.raises(ValueError, match="no room"), turns.take(pytest.fail):
        raise ValueError("no room")
    with turns.take(pytest.fail):
        pass


def test_sessions_at_once_wait_for_the_model_and_say_so(monkeypatch, folder, gpt2):
    sae, layer, turns, busy = Checkpoint(folder / "topk").sae, gpt2.layer(1), Turns(), Lock()
    texts = ["one two", "red green blue", "a b a b", "the end"]
    alone = [run_prompt(layer, sae, text) for text in texts]
    said, kept = Queue(), [[] for _ in texts]
    place = MagicMock(text=said.put)
    monkeypatch.setattr(live.st, "empty", lambda: place)
    monkeypatch.setattr(live.st, "spinner", nullcontext)
    monkeypatch.setattr(live, "_turns", lambda: turns)

    def session(text: str, cell: list):
        def compute():
            assert busy.acquire(blocking=False), "two at once"
            try:
                return run_prompt(layer, sae, text)
            finally:
                busy.release()

        return lambda: live.in_turn(cell, "Running the prompt", compute)

    with turns.take(pytest.fail):
        threads = []
        for number, (text, cell) in enumerate(zip(texts, kept, strict=True), start=1):
            threads += started(session(text, cell))
            before = "1 prompt is" if number == 1 else f"{number} prompts are"
            while said.get(timeout=PATIENCE) != f"Waiting for the language model: {before} before this one.":
                pass  # those who came earlier say so again
    for thread in threads:
        thread.join(PATIENCE)
    for run, (again,) in zip(alone, kept, strict=True):
        torch.testing.assert_close(again.f, run.f)
    place.text = pytest.fail
    assert live.in_turn(kept[0], "Running the prompt", pytest.fail) is kept[0][0], "what is known waits for nobody"
