"""What people write about a feature: its label and note, the lists that it is on, and comments with a name."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone

import streamlit as st

from analysis.comments import AUTHOR, TEXT, Comments
from analysis.labels import Labels
from analysis.lists import Lists
from pages.shared.exports import downloads
from pages.shared.page import refuse
from trainer.checkpoint import Checkpoint


def show(checkpoint: Checkpoint, feature: int) -> None:
    """Its label and note, and the comments on it."""
    with st.container(border=True, key="notes"):
        _label_form(Labels(checkpoint.path), feature)
        _comments(Comments(checkpoint.path), feature)


def lists(checkpoint: Checkpoint, feature: int) -> None:
    """The lists that a feature is on, old ones and new ones."""
    kept = Lists(checkpoint.path)
    key = f"lists_{feature}"  # a choice for one feature never lands on another

    def put_there() -> None:
        with _or_refused("list_refused"):
            kept.put(feature, st.session_state[key])

    try:
        every = kept.all()
    except ValueError as error:
        refuse(error)
        return
    on = [name for name, features in every.items() if feature in features]
    st.session_state.setdefault(key, on)
    st.multiselect(
        "Lists", sorted(every), key=key, accept_new_options=True, on_change=put_there, placeholder="put it on a list",
        label_visibility="collapsed", help="type a new name to make a list",
    )  # fmt: skip
    _say_refused("list_refused")


def exchange(checkpoint: Checkpoint) -> None:
    """Labels of a checkpoint as JSON or CSV, out and in; its comments out."""
    labels, name = Labels(checkpoint.path), checkpoint.name
    try:
        downloads(labels.table(), "Labels", f"labels-{name}")
        downloads(Comments(checkpoint.path).table(), "Comments", f"comments-{name}")
        file = st.file_uploader(
            "Import labels from JSON or CSV", type=["json", "csv"], help="replaces labels of the same features"
        )
        if file is not None and st.button("Import"):
            n = labels.load(file.getvalue(), checkpoint.config.sae.d_sae)
            st.success(f"{n} labels imported.")
    except ValueError as error:
        refuse(error)


def _label_form(labels: Labels, feature: int) -> None:
    try:
        now = labels.get(feature)
    except ValueError as error:
        refuse(error)
        return
    # Keys carry the feature: a text that was typed for one never lands on another.
    st.text_input("Your label", now.label, key=f"text_{feature}", max_chars=200)
    st.text_area("Note", now.note, key=f"note_{feature}", height=80, max_chars=5000)
    st.session_state.setdefault(f"seen_{feature}", now.changed)
    st.button("Save", key=f"save_{feature}", on_click=_save, args=(labels, feature))
    _say_refused("label_refused")


def _save(labels: Labels, feature: int) -> None:
    text, note, seen = (st.session_state[f"{name}_{feature}"] for name in ("text", "note", "seen"))
    with _or_refused("label_refused"):
        labels.put(feature, text, note, seen)
        st.session_state[f"seen_{feature}"] = labels.get(feature).changed
        st.toast("Saved")


def _comments(comments: Comments, feature: int) -> None:
    """What was said, and a field for more; keys carry the feature, as above."""

    def add() -> None:
        with _or_refused("comment_refused"):
            comments.add(feature, st.session_state["author"], st.session_state[key])
            st.session_state["known_as"], st.session_state[key] = st.session_state["author"], ""

    def remove(id: int) -> None:
        with _or_refused("comment_refused"):
            comments.remove(id)

    try:
        said = [each for each in comments.all() if each.feature == feature]
    except ValueError as error:
        refuse(error)
        return
    key = f"comment_{feature}"
    for each in said:
        with st.container(horizontal=True, vertical_alignment="top"):
            st.text(
                f"{each.author}, {datetime.fromtimestamp(each.written, timezone.utc):%Y-%m-%d %H:%M} UTC\n{each.text}"
            )
            st.button("Remove", key=f"remove_{each.id}", on_click=remove, args=(each.id,), type="tertiary")
    with st.expander("Comment"):
        known_as = st.session_state.get("known_as", "")  # a field is forgotten where another page is shown
        st.text_input("Your name", known_as, key="author", max_chars=AUTHOR)
        st.text_area("Comment", key=key, height=80, max_chars=TEXT, label_visibility="collapsed")
        st.button("Post", key=f"post_{feature}", on_click=add)
    _say_refused("comment_refused")


@contextmanager
def _or_refused(key: str) -> Iterator[None]:
    """In a callback: why something could not be written is kept under `key`, until `_say_refused` says it."""
    try:
        yield
    except ValueError as error:
        st.session_state[key] = str(error)


def _say_refused(key: str) -> None:
    if refused := st.session_state.pop(key, None):
        refuse(f"{refused}.")
