"""One way each to pick a checkpoint, a head, a text, a prompt, an option and a row of a table; all are in the URL."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any, NamedTuple

import streamlit as st

from analysis.runs.sets import counterpart
from analysis.store import looks_whole
from pages.shared.address import assume, came_back, forget
from pages.shared.page import LINKED, folder, plain, typed
from trainer.checkpoint import Checkpoint, list_checkpoints

ALL = "all"
_LAST = "last checkpoint"  # that was looked at, on whichever page
HELD_OUT, REPEATED = "Held-out text", "Repeated random tokens"
FIRST_COMMAND = "python -m trainer --distinct_tokens=130000 --total_training_steps=300 --batch_size=2048"


class Example(NamedTuple):
    """A prompt of a tour."""

    prompt: str
    what: str
    """to see on it"""
    chosen: Mapping[str, str] = MappingProxyType({})
    """values of widgets by their key, that show it"""


# A tour on the shipped checkpoint batchtopk-x8-k32: what one should see is tested in tests/trainer/test_embedded.py.
EXAMPLES = {
    "Induction": Example(
        "The cat sat on the mat. The dog ran to the park. The cat sat on the",
        "At the last token the features of heads 3, 4 and 5 read ' mat', which followed the earlier ' the': the "
        "induction slot. Take away all features of head 4 and ' mat' falls from 47 % to 33 %, while the direct effect "
        "hardly moves: later layers carry it.",
    ),
    "Indirect object": Example(
        "When John and Mary went to the store, John gave a drink to",
        "At ' to' the strongest features are head 8's, and they read the previous token, ' drink'. The name is settled "
        "elsewhere: with all of the layer replaced by its reconstruction ' Mary' keeps 89 of 90 %, and of single heads "
        "only head 4 matters (85 % without its features).",
    ),
    "Previous token": Example(
        "Fellow citizens of the Senate and of the House of Representatives: I congratulate you on the favorable state "
        "of our public affairs. The Senate and the House of",
        "Pick head 8 and the last token: its features read ' House', one token back. It is the one head whose role is "
        "the previous token by DFA, while by attention every head rests on BOS.",
    ),
    "Duplicate token": Example(
        "Paris, London, Paris, Rome, London, Rome, Berlin, Paris, Berlin, London",
        "No head of this layer is a duplicate-token head: the largest shares of DFA on earlier copies are head 7's and "
        "head 0's, a fifth to a quarter. Heads 3, 4 and 5 read instead what followed the earlier copies, the commas.",
    ),
}


def readable(required: bool = True) -> list[Checkpoint]:
    """Checkpoints that can be shown; the others are listed with their reason, and the app goes on.

    Args:
        required: end the page with how to train one, where there is none.
    """
    checkpoints, errors = list_checkpoints(folder())
    if errors:
        with st.expander(
            f"{len(errors)} unreadable checkpoint(s) in {plain(folder().name)}", icon=":material/warning:"
        ):
            for error in errors:
                st.text(typed(str(error)))
    if required and not checkpoints:
        st.info("There is no checkpoint to show yet. Train one, it appears here while it trains:")
        st.code(FIRST_COMMAND, language="bash")
        st.stop()
    return checkpoints


def pick_checkpoint(checkpoints: list[Checkpoint], label: str, key: str, index: int = 0) -> Checkpoint:
    """A select box over the checkpoints of a layer, kept in the URL under `key`; one of layers where there are several.

    Streamlit leaves defaults out of the URL. Which checkpoint is the default changes as others are trained, so the box
    has none: the name is written down, and a link means the same SAE tomorrow. Without a name in the URL it is the one
    that was looked at last.

    Args:
        index: of the first of several boxes 0; the others offer every layer, and count from the default.
    """
    by_name = {checkpoint.name: checkpoint for checkpoint in checkpoints}
    names = list(by_name)
    last = st.session_state.get(_LAST) if index == 0 else None
    default = last if last in by_name else names[(names.index(best(checkpoints).name) + index) % len(names)]
    wanted, missing = st.query_params.get(key), f"{key} that is not there"
    name = wanted if came_back() else st.session_state.get(key, wanted)
    if (linked := st.query_params.pop(LINKED, None)) is not None:
        name = wanted = linked
        if name in by_name:
            st.session_state[key] = name
    if name not in by_name or wanted is None:  # after Back, or from another page that has such a box too
        name = st.session_state[key] = name if name in by_name else default
        assume(key, name)  # an address without a name would leave the box empty
    if wanted is not None and wanted not in by_name:
        st.session_state[missing] = wanted, name
    # Said as long as it is so: the address has the other name once the page, or a part of it, is run again.
    asked, instead = st.session_state.get(missing, (None, None))
    if name == instead:
        st.warning(f"There is no checkpoint {plain(asked)} in {plain(folder().name)}: {plain(name)} is shown.")
    if index == 0:
        _pick_site(checkpoints, by_name[name], key)
        names = [checkpoint.name for checkpoint in checkpoints if checkpoint.site == by_name[name].site]
    chosen = by_name[st.selectbox(label, names, None, key=key, bind="query-params") or default]
    if index == 0:
        st.session_state[_LAST] = chosen.name
    return chosen


def _pick_site(checkpoints: list[Checkpoint], chosen: Checkpoint, key: str) -> None:
    """A select box over layers, by number: another one chooses the same SAE there, else what is best there.

    It is not in the URL, which names the checkpoint.
    """
    sites = {each.site: each for each in sorted(checkpoints, key=lambda each: (each.config.model.name, each.layer))}
    if len(sites) == 1:
        return

    def another() -> None:
        there = [each for each in checkpoints if each.site == st.session_state[box]]
        put(key, (counterpart(chosen, there) or best(there)).name)

    one_model = len({each.config.model.fingerprint for each in checkpoints}) == 1
    box = f"{key}-layer"
    st.session_state[box] = chosen.site
    words = {site: str(each.layer) if one_model else site for site, each in sites.items()}
    width = 100 if one_model else 220
    st.selectbox("Layer", list(sites), key=box, format_func=words.__getitem__, on_change=another, width=width)


def best(checkpoints: list[Checkpoint]) -> Checkpoint:
    """The plain block-diagonal checkpoint with L0 up to 40 (which one can read) that keeps most; else the sparsest.

    Plain: neither a baseline nor labelled as a variant. One with an analysis that is no summary goes before others: on
    every page it has most to show.
    """

    def rank(checkpoint: Checkpoint) -> tuple[bool, bool, bool, float]:
        figures = checkpoint.eval or {"L0": math.inf, "FVU": math.inf}
        options = checkpoint.config.options
        variant = checkpoint.is_dense or options is None or options.sae.label is not None
        legible = figures["L0"] <= 40
        return variant, not legible, not looks_whole(checkpoint), figures["FVU"] if legible else figures["L0"]

    return min(checkpoints, key=rank)


def select(column: Any, label: str, options: Sequence[str], key: str, typed: bool = False, **more: Any) -> str:
    """A select box; a choice that is no option any more gives way to the first, also in the URL.

    Args:
        typed: whether something that is no option can be typed.
    """
    shown = f"shown {key}"
    forgotten = key not in st.session_state and key not in st.query_params and "index" not in more
    lost = not typed and st.session_state.get(key, options[0]) not in options
    if lost or (forgotten and st.session_state.get(shown, options[0]) != options[0]):
        st.session_state[key] = options[0]  # said aloud: a browser goes on showing what it had
    chosen = column.selectbox(label, options, key=key, bind="query-params", accept_new_options=typed, **more)
    chosen = chosen or options[0]  # what is typed can be cleared
    st.session_state[shown] = chosen
    return chosen


def choose(
    label: str, options: Iterable[str], key: str, default: str | None = None, column: Any = st, **more: Any
) -> str:
    """One of a few options side by side, always one of them; the default is the first.

    A choice that is no option any more gives way to the default.
    """
    options = list(options)
    default = default or options[0]
    if st.session_state.get(key, default) not in options:
        del st.session_state[key]
    chosen = column.segmented_control(
        label, options, default=default, required=True, key=key, bind="query-params", **more
    )
    return chosen or default  # none where an address says so, as `?show=` does


def number(column: Any, label: str, *limits: Any, key: str, **more: Any) -> Any:
    """A field for a number; Streamlit ends with a traceback where an address says that it is infinite."""
    with suppress(ValueError):
        if math.isinf(float(st.query_params.get(key, 0))):
            forget(key)
    return column.number_input(label, *limits, key=key, bind="query-params", **more)


def pick_head(n_heads: int, label: str = "Head", key: str = "head", column: Any = st, **more: Any) -> int | None:
    """One head, or None for all of them."""
    head = select(column, label, [ALL, *map(str, range(n_heads))], key, **more)
    return None if head == ALL else int(head)


def pick_one_head(n_heads: int) -> int:
    """The head whose details are shown, chosen here or by a tick in a table."""
    return int(st.selectbox("Head", list(range(n_heads)), key="of_head", bind="query-params"))


def pick_text(label: str = "Evaluated on", key: str = "text", text: str = HELD_OUT, column: Any = st) -> bool:
    """Whether figures on repeated random tokens are asked for, instead of those on text."""
    return choose(label, [text, REPEATED], key, column=column) == REPEATED


def pick_prompt(
    column: Any = st, examples: Any = st, dependent: Sequence[str] = (), tour: dict[str, Example] = EXAMPLES
) -> str:
    """The prompt, and a tour of examples by name.

    Args:
        column: where the field stands.
        examples: where the buttons of the tour stand.
        dependent: keys of widgets whose choice means nothing on another prompt.
    """

    def another(example: Example | None = None) -> None:
        drop(dependent)
        if example is not None:
            for key, value in {"prompt": example.prompt, **example.chosen}.items():
                put(key, value)

    with examples.container(horizontal=True, gap="small"):
        for name, example in tour.items():
            key, said = f"example_{name}", example.prompt
            st.button(name, key=key, on_click=another, args=(example,), help=said, type="tertiary")
    first = next(iter(tour.values()))
    prompt = column.text_area("Prompt", first.prompt, key="prompt", bind="query-params", height=68, on_change=another)
    if prompt == first.prompt:  # the page opens as the tour does
        for key, value in first.chosen.items():
            if key not in st.session_state and key not in st.query_params:
                st.session_state[key] = value
    return prompt


def show_example(prompt: str, tour: dict[str, Example] = EXAMPLES, of: str = "batchtopk-x8-k32") -> None:
    """What to see on a prompt of the tour, which was written of the shipped SAE or set called `of`."""
    for example in tour.values():
        as_told = all(st.session_state.get(key) == value for key, value in example.chosen.items())
        if prompt == example.prompt and as_told:
            st.caption(f"On the shipped {of}: {example.what}")


def pick_row(key: str, into: str, values: Sequence[Any]) -> dict[str, Any]:
    """Arguments of a table called `key`: a tick on a row chooses its value in the widget called `into`."""

    def ticked() -> None:
        if rows := st.session_state[key]["selection"]["rows"]:
            put(into, values[rows[0]])

    return {"key": key, "on_select": ticked, "selection_mode": "single-row"}


def drop(keys: Iterable[str]) -> None:
    """Take back what is chosen in widgets, also in the address, from the callback of another one."""
    for key in keys:
        st.session_state.pop(key, None)
        forget(key)


def put(key: str, value: Any) -> None:
    """Choose a value in the widget called `key`, from the callback of another one."""
    st.session_state[key] = value
