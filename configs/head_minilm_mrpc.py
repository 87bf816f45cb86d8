"""The classifier alone, on MiniLM-L6 as it is: MRPC of GLUE.

qalora train --config=configs/head_minilm_mrpc.py --workdir=runs/head_minilm_mrpc
qalora evaluate --workdir=runs/head_minilm_mrpc --tasks=mrpc --config.evaluate.data=glue

Minutes on two cores: about 12.  Expected: see experiments/results/glue.md.
"""

from configs import minilm


def get_config():
  return minilm.finetune('mrpc', 'head')
