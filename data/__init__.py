"""Images and questions in, shards of states and attention maps out, batches for the predictor.

A harvest reads `images`, `questions` and a model (`vlm`, `chat`). `plan` assigns images to shards, `harvester` makes
them, `folder` knows which of them are there; `harvest` runs in one process or rank, `cluster` on Ray. `sample`,
`shards` and `index` are the files on disk, `datamodule` and `batches` what a fit reads of them. `settings` holds what
can be chosen. Nothing is imported here: `data.datamodule` needs Lightning, `data.vlm` needs transformers, and neither
should cost the other anything.
"""

import os

# Before torch starts its threads. Threads that spin while they wait made a machine with busy cores 8 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
