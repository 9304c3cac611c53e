"""The app: `streamlit run app.py`. Pages read checkpoint directories; only prompts run a model."""

import streamlit as st

from pages.shared.address import permalink

# Pages have no icons of their own: Streamlit would fetch each as favicon from a font host.
ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8">
<rect width="8" height="8" rx="1" fill="#0072B2"/>
<path fill="#fff" d="M1 1h2v2H1zM3 3h2v2H3zM5 5h2v2H5z"/></svg>"""

page = st.navigation(
    [
        st.Page("pages/model.py", title="Model", default=True),
        st.Page("pages/tradeoffs.py", title="Tradeoffs"),
        st.Page("pages/heads.py", title="Heads"),
        st.Page("pages/features.py", title="Features"),
        st.Page("pages/prompt.py", title="Prompt"),
        st.Page("pages/circuit.py", title="Circuit"),
        st.Page("pages/compare.py", title="Compare"),
        st.Page("pages/runs.py", title="Runs"),
        st.Page("pages/start.py", title="Start"),
    ],
    position="top",  # tables and charts need the width
)
st.set_page_config(page_title=f"{page.title} · Attention-head SAEs", page_icon=ICON, layout="wide")
with permalink():
    page.run()
