"""QLoRA, rank 64, on NF4 with double quantization: Llama-2-7B on Alpaca.

qalora train --config=configs/qlora_llama2_7b.py --workdir=runs/qlora_llama2_7b
Reads ./alpaca_data.json, or --config.data.train.path=FILE.

Devices and hours: unknown.  Expected: not yet run.
"""

from configs import llama


def get_config():
  return llama.finetune('llama2_7b', 'qlora')
