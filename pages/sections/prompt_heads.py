"""What each head does on a prompt."""

import streamlit as st

from analysis.prompt.run import PromptRun, role_table, roles
from pages.charts import prompt as charts
from pages.shared.columns import draw_table


def show(run: PromptRun) -> None:
    """Shares of attention and DFA by source slot, and the largest slot of each head."""
    st.subheader("What each head does on this prompt", anchor=False)
    st.caption(
        "Shares over all destinations but BOS. Upper bar, attention: where the head looks. Lower bar, DFA: what the "
        "features that fire read. Slots are exclusive, the first that applies counts: bos, self, induction (after an "
        "earlier copy of this token), duplicate (an earlier copy), previous, the fuzzy ones (of a similar token), then "
        "the class of the token that is read, local (2 to 5 back), other."
    )
    shares = roles(run)
    left, right = st.columns([3, 2])
    left.altair_chart(charts.role_bars(shares))
    with right:
        agree = st.column_config.CheckboxColumn(width=60)
        draw_table(role_table(shares), {"by attention": 90, "by DFA": 90, "agree": agree})
