"""One-pass SCR inside vLLM: a plug-in that edits the prefills of its own modelling code. See docs/vllm.md.

vLLM loads ``plugin.register`` by the entry point ``vllm.general_plugins``; nothing here is imported otherwise. Only
``metrics`` and what stands behind it needs what vLLM brings to be imported.

    settings     what the environment and a request ask for
    chunks       where a chunk of a prefill, or a prefix hit, may end
    images       the images of a step: where their tokens lie in the flattened batch, and which text asks about them
    editor       the predictor is asked, and the states are edited, by scr_runtime's own functions
    hazards      what would drop or misplace an edit: refused at start
    plugin       puts all this into a VllmConfig
    metrics      counters for Prometheus
    operator     the edit as a custom operator, which compiled graphs keep
    scheduler    whole images in every chunk and behind every prefix hit
    worker       attaches the editor to the loaded model, tests it, counts
"""
