"""Pruned models in lmms-eval, as a plugin on its entry point: nothing of it is patched, nothing else imports this."""
