"""The page on which people judge: blind comparisons and scores, what is kept of them, and what they say."""
