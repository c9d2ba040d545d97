#pragma once
#include "pyramid_images.cuh"
