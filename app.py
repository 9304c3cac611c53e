"""The app: `streamlit run app.py`. Pages read checkpoint directories; only prompts run a model."""

import streamlit as st

st.set_page_config(page_title="Attention-head SAEs", layout="wide")

st.navigation(
    [
        st.Page("pages/tradeoffs.py", title="Tradeoffs", icon=":material/scatter_plot:", default=True),
        st.Page("pages/heads.py", title="Heads", icon=":material/bar_chart:"),
        st.Page("pages/prompt.py", title="Prompt", icon=":material/edit_note:"),
        st.Page("pages/compare.py", title="Compare", icon=":material/compare_arrows:"),
    ]
).run()
