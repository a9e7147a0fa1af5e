"""Parts of compare_losses.py: runs, outcomes, summaries and the page."""
