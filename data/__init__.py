"""Images and questions in, shards of states and attention maps out, batches for the predictor.

`images`, `questions` and `vlm` are what a harvest reads, `shards` is the one place that knows the files on disk,
`harvest` fills them and `datamodule` reads them. `jobs` knows what is planned, there and missing; `ranks` and
`cluster` divide it among processes. Nothing is imported here: `data.datamodule` needs Lightning, `data.vlm` needs
transformers, and neither should cost the other anything.
"""

import os

# Before torch starts its threads. Threads that spin while they wait made a machine with busy cores 8 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
