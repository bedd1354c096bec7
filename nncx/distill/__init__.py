"""Distillation: a student learns from a frozen teacher, with any sum of losses.

========================  ===========================================  ======  ========
loss                      compares                                     labels  paper
========================  ===========================================  ======  ========
:class:`L2`               logits                                       no      Ba 2014
:class:`KD`               softened class probabilities                 alpha   Hinton 2015
:class:`Hint`             an inner layer, through a regressor          no      FitNets 2015
:class:`AnnealedKD`       softened class probabilities, less and less  yes     FitNets 2015
:class:`FSP`              products of two layers' maps                 no      Yim 2017
:class:`Adversarial`      features, through a trained discriminator    no      ANC 2018
========================  ===========================================  ======  ========

:class:`Distiller` puts student, teacher and losses together. The methods of the papers are such
tasks, one or several in a row: :func:`fitnets`, :func:`fsp`, :func:`anc`, and all of them, with the
supervised student, through :func:`by_name`.
"""

from nncx.distill._observe import Outputs, feature_size
from nncx.distill.adversarial import Adversarial, anc
from nncx.distill.distiller import Distiller
from nncx.distill.flow import FSP, fsp
from nncx.distill.hint import AnnealedKD, Hint, fitnets
from nncx.distill.kd import KD
from nncx.distill.l2 import L2, logit_std
from nncx.distill.methods import METHODS, by_name
from nncx.distill.stage import Stage

__all__ = [
    "FSP",
    "KD",
    "L2",
    "METHODS",
    "Adversarial",
    "AnnealedKD",
    "Distiller",
    "Hint",
    "Outputs",
    "Stage",
    "anc",
    "by_name",
    "feature_size",
    "fitnets",
    "fsp",
    "logit_std",
]
