"""QA-LoRA, rank 64, on 4 bits in groups of 32: T5 v1.1 XL (2.8B) on Super-NaturalInstructions.

qalora plan --config=configs/qalora_t5_3b.py --topology=h100
qalora train --config=configs/qalora_t5_3b.py --workdir=runs/qalora_t5_3b
Reads ./natural_instructions.jsonl (prompt, completion), or --config.data.train.path=FILE.

Devices and hours: unknown.  Expected: not yet run; QLoRA's Table 3 has RougeL 55.3 with LoRA on NF4.
"""

from configs import t5


def get_config():
  return t5.finetune('t5_3b')
