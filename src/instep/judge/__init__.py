"""The human-evaluation page: blind comparisons and scores, what is kept of them, and what they say."""
