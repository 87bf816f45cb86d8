"""QA-LoRA, rank 64, on GPTQ in 4 bits and groups of 32: LLaMA-7B on Alpaca.

qalora train --config=configs/qalora_llama_7b.py --workdir=runs/qalora_llama_7b
Reads ./alpaca_data.json, or --config.data.train.path=FILE; calibrates on C4, or --config.calibration.text.path=FILE.

Devices and hours: unknown.  Expected: not yet run.
"""

from configs import llama


def get_config():
  return llama.finetune('llama_7b', 'qalora')
