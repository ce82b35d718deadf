"""A server that speaks OpenAI's chat completions for one model with SCR: `python -m scr_runtime.serve`.

It needs the extra `serve`. Nothing in `scr_runtime` outside this package imports it.
"""
