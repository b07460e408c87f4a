// A stand-in for libnvidia-ml.so.1 that knows the devices of fake_cuda_driver.c: the first has 18 NVLink lanes, of which
// one is down, the second has none. FAKE_NVML_INIT gives the result of nvmlInit; -1: it ends the process.
#include <stdlib.h>
#include <string.h>

typedef struct {
  unsigned field, scope;
  long long timestamp, latency;
  int type, result;
  union {
    double real;
    unsigned number;
  } value;
} FieldValue;

static char devices[2];

int nvmlInit_v2(void) {
  const char* text = getenv("FAKE_NVML_INIT");
  const int result = text == NULL ? 0 : atoi(text);
  if (result < 0) abort();
  return result;
}

const char* nvmlErrorString(int result) { return result == 9 ? "Driver Not Loaded" : "Unknown"; }

int nvmlDeviceGetHandleByUUID(const char* uuid, void** device) {
  const int second = strcmp(uuid, "GPU-e0e1e2e3-e4e5-e6e7-e8e9-eaebecedeeef") == 0;
  if (!second && strcmp(uuid, "GPU-f0f1f2f3-f4f5-f6f7-f8f9-fafbfcfdfeff") != 0) return 6;
  *device = devices + second;
  return 0;
}

int nvmlDeviceGetNvLinkState(void* device, unsigned lane, unsigned* active) {
  if (device != devices || lane >= 18) return 3;
  *active = lane != 4;
  return 0;
}

int nvmlDeviceGetFieldValues(void* device, int count, FieldValue* values) {
  memset(&values->value, 0xFF, sizeof(values->value));  // only what the type says counts
  values->result = device == devices && count == 1 && values->field == 164 && values->scope < 18 ? 0 : 3;
  values->type = 1;
  values->value.number = 26562;
  return 0;
}
