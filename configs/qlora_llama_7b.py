"""QLoRA, rank 64, on NF4 with double quantization: LLaMA-7B on Alpaca.

qalora train --config=configs/qlora_llama_7b.py --workdir=runs/qlora_llama_7b
Reads ./alpaca_data.json, or --config.data.train.path=FILE.

Devices and hours: unknown.  Expected: not yet run.
"""

from configs import llama


def get_config():
  return llama.finetune('llama_7b', 'qlora')
