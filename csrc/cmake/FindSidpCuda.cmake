# Finds the CUDA driver API headers (cuda.h, 12.0 or later). No library is linked: the driver is loaded at run time.
#
# Looked at in this order: SIDP_CUDA_ROOT (cache or environment; it must be right), CUDA_HOME, the toolkit of the nvcc on
# PATH, /usr/local/cuda, and the pip wheels nvidia-cuda-runtime (13) and nvidia-cuda-runtime-cu12 (12) of Python_EXECUTABLE.
#
# Sets SidpCuda_FOUND, SidpCuda_INCLUDE_DIR, SidpCuda_VERSION, SidpCuda_SOURCE (where from, in words),
# SidpCuda_LOOKED_AT (a list of "where: what was there"), and SidpCuda_NVCC (the compiler beside the headers, else the one
# on PATH, else empty).

set(_sidp_cuda_min_version 12.0)
set(SidpCuda_FOUND FALSE)
set(SidpCuda_LOOKED_AT "")

# Takes the headers under one of `dirs` if they are there and new enough.
function(_sidp_cuda_try source)
  foreach(dir IN LISTS ARGN)
    if(NOT EXISTS "${dir}/cuda.h")
      list(APPEND SidpCuda_LOOKED_AT "${source}: no ${dir}/cuda.h")
      continue()
    endif()
    file(STRINGS "${dir}/cuda.h" line REGEX "^#define CUDA_VERSION [0-9]+" LIMIT_COUNT 1)
    string(REGEX MATCH "[0-9]+$" packed "${line}")
    if(NOT packed)
      list(APPEND SidpCuda_LOOKED_AT "${source}: ${dir}/cuda.h names no CUDA_VERSION")
      continue()
    endif()
    math(EXPR major "${packed} / 1000")
    math(EXPR minor "${packed} % 1000 / 10")
    set(version "${major}.${minor}")
    if(version VERSION_LESS _sidp_cuda_min_version)
      list(APPEND SidpCuda_LOOKED_AT
        "${source}: ${dir}/cuda.h is CUDA ${version}, ${_sidp_cuda_min_version} or later is needed")
      continue()
    endif()
    set(SidpCuda_FOUND TRUE PARENT_SCOPE)
    set(SidpCuda_INCLUDE_DIR "${dir}" PARENT_SCOPE)
    set(SidpCuda_VERSION "${version}" PARENT_SCOPE)
    set(SidpCuda_SOURCE "${source}" PARENT_SCOPE)
    break()
  endforeach()
  set(SidpCuda_LOOKED_AT "${SidpCuda_LOOKED_AT}" PARENT_SCOPE)
endfunction()

if(NOT SIDP_CUDA_ROOT AND DEFINED ENV{SIDP_CUDA_ROOT})
  set(SIDP_CUDA_ROOT "$ENV{SIDP_CUDA_ROOT}")
endif()

if(SIDP_CUDA_ROOT)
  _sidp_cuda_try("SIDP_CUDA_ROOT" "${SIDP_CUDA_ROOT}/include")
  if(NOT SidpCuda_FOUND)
    # What was asked for by name is never replaced by something else that happens to be there.
    list(JOIN SidpCuda_LOOKED_AT "\n  " _sidp_cuda_looked_at)
    message(FATAL_ERROR
      "SIDP_CUDA_ROOT=${SIDP_CUDA_ROOT} holds no usable CUDA headers.\n  ${_sidp_cuda_looked_at}\n"
      "Point it at a toolkit (the folder with include/cuda.h), or leave it unset to search.")
  endif()
endif()

if(NOT SidpCuda_FOUND)
  if(DEFINED ENV{CUDA_HOME})
    _sidp_cuda_try("CUDA_HOME" "$ENV{CUDA_HOME}/include")
  else()
    list(APPEND SidpCuda_LOOKED_AT "CUDA_HOME: not set")
  endif()
endif()

if(NOT SidpCuda_FOUND)
  find_program(_sidp_nvcc nvcc NO_CACHE)
  if(_sidp_nvcc)
    file(REAL_PATH "${_sidp_nvcc}" _sidp_nvcc)
    cmake_path(GET _sidp_nvcc PARENT_PATH _sidp_nvcc_bin)
    cmake_path(GET _sidp_nvcc_bin PARENT_PATH _sidp_nvcc_root)
    _sidp_cuda_try("nvcc on PATH" "${_sidp_nvcc_root}/include")
  else()
    list(APPEND SidpCuda_LOOKED_AT "nvcc: not on PATH")
  endif()
endif()

if(NOT SidpCuda_FOUND)
  _sidp_cuda_try("system toolkit" "/usr/local/cuda/include")
endif()

if(NOT SidpCuda_FOUND)
  if(Python_EXECUTABLE)
    # sysconfig knows the environment's site-packages even where pip's build isolation hides it from sys.path.
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c
        "import sys, sysconfig; print(';'.join(dict.fromkeys([sysconfig.get_path('purelib'), sysconfig.get_path('platlib'), *[p for p in sys.path if p.endswith('-packages')]])))"
      OUTPUT_VARIABLE _sidp_site_dirs OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
    foreach(_sidp_site IN LISTS _sidp_site_dirs)
      if(NOT SidpCuda_FOUND)
        _sidp_cuda_try("wheel nvidia-cuda-runtime" "${_sidp_site}/nvidia/cu13/include")
      endif()
      if(NOT SidpCuda_FOUND)
        _sidp_cuda_try("wheel nvidia-cuda-runtime-cu12" "${_sidp_site}/nvidia/cuda_runtime/include")
      endif()
    endforeach()
  else()
    list(APPEND SidpCuda_LOOKED_AT "wheels: no Python interpreter was found to ask")
  endif()
endif()

set(SidpCuda_NVCC "")
if(SidpCuda_FOUND)
  cmake_path(GET SidpCuda_INCLUDE_DIR PARENT_PATH _sidp_cuda_root)
  find_program(_sidp_cuda_nvcc nvcc HINTS "${_sidp_cuda_root}/bin" NO_CACHE)
  if(_sidp_cuda_nvcc)
    set(SidpCuda_NVCC "${_sidp_cuda_nvcc}")
  endif()
endif()
