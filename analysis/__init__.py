"""Computes what the pages draw. No Streamlit in here."""
