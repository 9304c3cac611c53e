"""The address of a page holds whatever is chosen on it, also where the browser forgets to write it down."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, urlencode

import streamlit as st
from streamlit.runtime.scriptrunner import StopException, get_script_run_ctx
from streamlit.runtime.state.query_params import _coerce_value_for_query_url as in_address


@contextmanager
def permalink() -> Iterator[None]:
    """Around a page, and around what is run again by itself: once it is drawn, its bound widgets are in the address.

    A browser writes the widget that a hand has changed. But where something appears above a widget (a spinner while a
    prompt runs, a sentence), Streamlit's frontend makes its column anew and forgets that it is bound to the address:
    https://github.com/streamlit/streamlit/blob/develop/frontend/lib/src/WidgetStateManager.ts. `st.query_params`
    refuses to write what is bound, so this reaches for what Streamlit itself writes with.
    """
    _restore()
    try:
        yield
    except StopException:  # a sentence instead of the rest: what is above it was chosen too
        _write()
        raise
    _write()  # not where the script is about to run again: half of the widgets may be missing


def forget(key: str) -> None:
    """What the address says of a widget that is not drawn yet is as if it said nothing."""
    context: Any = get_script_run_ctx()
    with context.session_state.query_params() as address:
        address._initial_query_params.pop(key, None)
        address.remove_param(key)


def came_back() -> bool:
    """Whether this run answers the browser's Back or Forward: the address alone says what is shown then."""
    context: Any = get_script_run_ctx()
    return context is not None and context.is_history_navigation


def assume(key: str, value: str) -> None:
    """As if the address held this of a widget that is not drawn yet."""
    context: Any = get_script_run_ctx()
    with context.session_state.query_params() as address:
        address.set_with_no_forward_msg(key, value)
        address._initial_query_params[key] = value


def _restore() -> None:
    """Back or Forward to another page: what both pages have in their addresses is there again.

    Streamlit takes it away, as it must where one page is left for another by a link.
    """
    if not came_back():
        return
    context: Any = get_script_run_ctx()
    with context.session_state.query_params() as address:
        for key, values in _parsed(context.query_string).items():
            if key not in address._query_params:
                address.set_with_no_forward_msg(key, values if len(values) > 1 else values[0])
        address.set_initial_query_params_from_current()


def _write() -> None:
    context: Any = get_script_run_ctx()
    if context is None:  # a script without a browser
        return
    drawn = context.shared.widget_ids_this_run.snapshot()
    with context.session_state.query_params() as address:
        for key, binding in address._bindings_by_param.items():
            if binding.widget_id not in drawn:
                continue
            widget = context.session_state._state._get_widget_metadata(binding.widget_id)
            value = st.session_state[key]
            if value == widget.deserializer(None):  # defaults are left out
                address._query_params.pop(key, None)
            else:
                address._query_params[key] = in_address(widget.serializer(value), widget.value_type)
        here = urlencode(address._query_params, doseq=True)
        # As the browser said, or was told since; after Back it was told what Streamlit took away.
        if came_back() or _parsed(here) != _parsed(context.query_string):
            address._send_query_param_msg()


def _parsed(query: str) -> dict[str, list[str]]:
    return parse_qs(query, keep_blank_values=True)
