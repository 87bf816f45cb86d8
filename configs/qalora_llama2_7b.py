"""QA-LoRA, rank 64, on GPTQ in 4 bits and groups of 32: Llama-2-7B on Alpaca.

qalora train --config=configs/qalora_llama2_7b.py --workdir=runs/qalora_llama2_7b
Reads ./alpaca_data.json, or --config.data.train.path=FILE; calibrates on C4, or --config.calibration.text.path=FILE.

Devices and hours: unknown.  Expected: not yet run.
"""

from configs import llama


def get_config():
  return llama.finetune('llama2_7b', 'qalora')
