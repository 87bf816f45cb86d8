"""QA-LoRA, rank 64, on GPTQ in 4 bits and groups of 32: Qwen2.5-7B on Alpaca.

qalora plan --config=configs/qalora_qwen2_5_7b.py --topology=h100
qalora train --config=configs/qalora_qwen2_5_7b.py --workdir=runs/qalora_qwen2_5_7b
Reads ./alpaca_data.json, or --config.data.train.path=FILE; calibrates on C4, or --config.calibration.text.path=FILE.

Devices and hours: unknown.  Expected: not yet run.
"""

from configs import relatives


def get_config():
  return relatives.finetune('qwen2_5_7b')
