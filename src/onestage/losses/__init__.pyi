from .box import (
    BoxLoss as BoxLoss,
    CIoULoss as CIoULoss,
    DIoULoss as DIoULoss,
    GIoULoss as GIoULoss,
    IoUBoxLoss as IoUBoxLoss,
    L1Loss as L1Loss,
    SmoothL1Loss as SmoothL1Loss,
)
from .class_weights import ClassWeights as ClassWeights, EffectiveNumberWeights as EffectiveNumberWeights
from .classification import (
    ClassificationLoss as ClassificationLoss,
    SigmoidClassificationLoss as SigmoidClassificationLoss,
    SoftmaxClassificationLoss as SoftmaxClassificationLoss,
)
from .focal import (
    SigmoidCrossEntropy as SigmoidCrossEntropy,
    SigmoidFocalLoss as SigmoidFocalLoss,
    SoftmaxCrossEntropy as SoftmaxCrossEntropy,
    SoftmaxFocalLoss as SoftmaxFocalLoss,
)
from .focal_variants import (
    AutomatedFocalLoss as AutomatedFocalLoss,
    QualityFocalLoss as QualityFocalLoss,
    VarifocalLoss as VarifocalLoss,
)
from .mining import MinedCrossEntropy as MinedCrossEntropy, OHEMCrossEntropy as OHEMCrossEntropy
from .normaliser import PositiveNormaliser as PositiveNormaliser
from .yolo import (
    GridBoxLoss as GridBoxLoss,
    ObjectSoftmaxLoss as ObjectSoftmaxLoss,
    SquaredGridBoxLoss as SquaredGridBoxLoss,
    SquaredObjectnessLoss as SquaredObjectnessLoss,
)

__all__: list[str]
