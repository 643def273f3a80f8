"""Training on top of packed weights, which stay as they are; whole runs are in `tuning`.

From text to steps: `data`, `packing`; the adapter: `adapters`, `lora`, `init`, `prepare`; the loop: `loop`, `loss`,
`optimizers`, `ranks`, `shards`; what is kept: `state`, `peft_file`, `curve`; `settings` says all that can be chosen.
"""

from __future__ import annotations

from whit.training.count import count_parameters
from whit.training.init import initialize_adapter
from whit.training.prepare import prepare_for_training

__all__ = ["count_parameters", "initialize_adapter", "prepare_for_training"]
