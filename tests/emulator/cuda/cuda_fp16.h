// __half in plain C++: what common.cuh asks of CUDA's header of this name.
#pragma once

struct __half {
  _Float16 value;
};
struct __half2 {
  __half x, y;
};
inline float __half2float(__half x) { return (float)x.value; }
inline __half __float2half_rn(float x) { return {(_Float16)x}; }
inline float2 __half22float2(__half2 x) { return {(float)x.x.value, (float)x.y.value}; }
inline __half2 __floats2half2_rn(float low, float high) { return {__float2half_rn(low), __float2half_rn(high)}; }
