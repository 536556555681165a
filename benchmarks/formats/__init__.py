"""Exported programs: ONNX Runtime, OpenVINO, TensorRT, int8."""
