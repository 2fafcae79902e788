"""The page of runs. What the command says of it stands here, so that a table need not load what a page needs."""

PAGE_FILE = "report.html"
NUM_SAMPLES = 3
"""Records of each training source, unless --samples says otherwise."""
