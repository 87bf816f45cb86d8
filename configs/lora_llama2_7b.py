"""LoRA, rank 64, on a dense bfloat16 base: Llama-2-7B on Alpaca.

qalora train --config=configs/lora_llama2_7b.py --workdir=runs/lora_llama2_7b
Reads ./alpaca_data.json, or --config.data.train.path=FILE.

Devices and hours: unknown.  Expected: not yet run.
"""

from configs import llama


def get_config():
  return llama.finetune('llama2_7b', 'lora')
