"""LoRA, rank 16, on MiniLM-L6: MRPC of GLUE.

qalora train --config=configs/lora_minilm_mrpc.py --workdir=runs/lora_minilm_mrpc
qalora evaluate --workdir=runs/lora_minilm_mrpc --tasks=mrpc --config.evaluate.data=glue
"""

from configs import minilm


def get_config():
  return minilm.finetune('mrpc', 'lora')
