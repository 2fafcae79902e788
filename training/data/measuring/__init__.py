"""Records measured for the index: one row, many rows stage by stage, processes that do so, pictures measured before."""
