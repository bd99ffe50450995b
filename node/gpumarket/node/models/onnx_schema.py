"""What an ONNX file may hold: its messages field by field, and the operators that are served.

Fields that stand for something refused are listed too, so that the refusal can name it. Source: onnx/onnx-ml.proto of ONNX 1.23, the
operator lists of its documentation.
"""

from __future__ import annotations

from typing import Final

from gpumarket.node.models.protobuf_reader import Field, Schemas


def _field(words: str) -> Field:
    name, kind, *rest = words.split()
    return Field(name, kind.rstrip("*"), kind.endswith("*"), rest[0] if rest else "")


_TEXT: Final = {
    "Model": {
        1: "ir_version int",
        2: "producer_name text",
        3: "producer_version text",
        4: "domain text",
        5: "model_version int",
        6: "doc_string text",
        7: "graph message Graph",
        8: "opset_import message* Opset",
        14: "metadata_props message* Entry",
        20: "training_info bytes*",
        25: "functions bytes*",
        26: "configuration bytes*",
    },
    "Graph": {
        1: "node message* Node",
        2: "name text",
        5: "initializer message* Tensor",
        10: "doc_string text",
        11: "input message* ValueInfo",
        12: "output message* ValueInfo",
        13: "value_info message* ValueInfo",
        14: "quantization_annotation bytes*",
        15: "sparse_initializer bytes*",
        16: "metadata_props message* Entry",
    },
    "Node": {
        1: "input text*",
        2: "output text*",
        3: "name text",
        4: "op_type text",
        5: "attribute message* Attribute",
        6: "doc_string text",
        7: "domain text",
        8: "overload text",
        9: "metadata_props message* Entry",
        10: "device_configurations bytes*",
    },
    "Attribute": {
        1: "name text",
        2: "f float",
        3: "i int",
        4: "s bytes",
        5: "t message Tensor",
        6: "g bytes",
        7: "floats float*",
        8: "ints int*",
        9: "strings bytes*",
        10: "tensors message* Tensor",
        11: "graphs bytes*",
        13: "doc_string text",
        14: "tp bytes",
        15: "type_protos bytes*",
        20: "type int",
        21: "ref_attr_name text",
        22: "sparse_tensor bytes",
        23: "sparse_tensors bytes*",
    },
    "Tensor": {
        1: "dims int*",
        2: "data_type int",
        3: "segment bytes",
        4: "float_data float*",
        5: "int32_data int*",
        6: "string_data bytes*",
        7: "int64_data int*",
        8: "name text",
        9: "raw_data bytes",
        10: "double_data double*",
        11: "uint64_data int*",
        12: "doc_string text",
        13: "external_data bytes*",
        14: "data_location int",
        16: "metadata_props message* Entry",
    },
    "ValueInfo": {1: "name text", 2: "type message Type", 3: "doc_string text", 4: "metadata_props message* Entry"},
    "Type": {
        1: "tensor_type message TensorType",
        4: "sequence_type bytes",
        5: "map_type bytes",
        6: "denotation text",
        7: "opaque_type bytes",
        8: "sparse_tensor_type bytes",
        9: "optional_type bytes",
    },
    "TensorType": {1: "elem_type int", 2: "shape message Shape"},
    "Shape": {1: "dim message* Dimension"},
    "Dimension": {1: "dim_value int", 2: "dim_param text", 3: "denotation text"},
    "Opset": {1: "domain text", 2: "version int"},
    "Entry": {1: "key text", 2: "value text"},
}

SCHEMAS: Final[Schemas] = {message: {n: _field(words) for n, words in fields.items()} for message, fields in _TEXT.items()}

DATATYPES: Final = {
    1: "FP32",
    2: "UINT8",
    3: "INT8",
    4: "UINT16",
    5: "INT16",
    6: "INT32",
    7: "INT64",
    9: "BOOL",
    10: "FP16",
    11: "FP64",
    12: "UINT32",
    13: "UINT64",
}
"""TensorProto.DataType → datatype of the Open Inference Protocol. The others are not served: strings, complex, bfloat16, small floats."""
STRING_TYPE: Final = 8
OPSETS: Final = {"": (7, 25), "ai.onnx": (7, 25), "ai.onnx.ml": (1, 5)}
IR_VERSIONS: Final = (3, 13)

CONTROL_FLOW: Final = frozenset({"If", "Loop", "Scan", "SequenceMap"})
"""A node that runs others, as often as data says: refused, so that a pass over the graph is a pass over its nodes."""
RANDOM: Final = frozenset({"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"})
"""What cannot be computed again cannot be checked."""
STRINGS: Final = frozenset({"RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit", "TfIdfVectorizer"})
_SEQUENCES: Final = """
ConcatFromSequence Optional OptionalGetElement OptionalHasElement SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert
SequenceLength SplitToSequence CastMap DictVectorizer ZipMap
"""
SEQUENCES: Final = frozenset(_SEQUENCES.split())
_STANDARD: Final = """
Abs Acos Acosh Add AffineGrid And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization BitCast BitShift BitwiseAnd
BitwiseNot BitwiseOr BitwiseXor BlackmanWindow Cast CastLike Ceil Celu CenterCropPad Clip Col2Im Compress Concat Constant ConstantOfShape
Conv ConvInteger ConvTranspose Cos Cosh CumSum DFT DeformConv DepthToSpace DequantizeLinear Det Div Dropout DynamicQuantizeLinear Einsum
Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool
Greater GreaterOrEqual GridSample GroupNormalization HammingWindow HannWindow HardSigmoid HardSwish Hardmax Identity InstanceNormalization
IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization LpPool MatMul MatMulInteger Max MaxPool
MaxRoiPool MaxUnpool Mean MeanVarianceNormalization MelWeightMatrix Min Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad
Pow QLinearConv QLinearMatMul QuantizeLinear RMSNormalization RNN Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax
ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign RotaryEmbedding Round STFT Scatter
ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub
Sum Swish Tan Tanh TensorScatter ThresholdedRelu Tile TopK Transpose Trilu Unique Unsqueeze Upsample Where Xor
"""
_CLASSICAL: Final = """
ArrayFeatureExtractor Binarizer FeatureVectorizer Imputer LabelEncoder LinearClassifier LinearRegressor Normalizer OneHotEncoder
SVMClassifier SVMRegressor Scaler TreeEnsemble TreeEnsembleClassifier TreeEnsembleRegressor
"""
OPERATORS: Final = {"": frozenset(_STANDARD.split()), "ai.onnx.ml": frozenset(_CLASSICAL.split())}
"""Served operators by domain: deterministic, tensors in and tensors out."""
