"""Distillation: a student learns from a frozen teacher, with any sum of losses.

========================  ===========================================  ======  ========
loss                      compares                                     labels  paper
========================  ===========================================  ======  ========
:class:`L2`               logits                                       no      Ba 2014
:class:`KD`               softened class probabilities                 alpha   Hinton 2015
:class:`Adversarial`      features, through a trained discriminator    no      ANC 2018
========================  ===========================================  ======  ========

:class:`Distiller` puts student, teacher and losses together; :func:`anc` is the composition of the
paper Adversarial Network Compression.
"""

from nncx.distill.adversarial import Adversarial, anc
from nncx.distill.distiller import Distiller, Outputs, feature_size
from nncx.distill.kd import KD
from nncx.distill.l2 import L2

__all__ = ["KD", "L2", "Adversarial", "Distiller", "Outputs", "anc", "feature_size"]
