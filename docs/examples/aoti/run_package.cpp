// Runs a package of `tomepass export --to aoti` without Python.
//
//   run_package vit.pt2 images.pt logits.pt
//
// images.pt holds one float32 tensor [B, 3, H, W], as torch.save wrote it; torch.load reads
// logits.pt. Any B will do where the batch was exported dynamic.
#include <fstream>
#include <iostream>
#include <iterator>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

namespace {

torch::Tensor read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot read ", path);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  return torch::pickle_load(bytes).toTensor();
}

void write(const char* path, const torch::Tensor& tensor) {
  const std::vector<char> bytes = torch::pickle_save(tensor);
  std::ofstream(path, std::ios::binary).write(bytes.data(), bytes.size());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: run_package PACKAGE IMAGES LOGITS\n";
    return 2;
  }
  try {
    const torch::InferenceMode without_gradients;
    torch::inductor::AOTIModelPackageLoader model(argv[1]);
    const std::vector<torch::Tensor> outputs = model.run({read(argv[2])});
    write(argv[3], outputs.at(0));
    std::cout << outputs.at(0).argmax(1) << "\n";
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
