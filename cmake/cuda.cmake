# Decides whether CUDA kernels are built, by which nvcc and for which GPUs:
#   DROPE_CUDA_VERSION        of the toolkit; empty: a CPU-only build
#   DROPE_NO_CUDA_REASON      why it is one; empty when CUDA kernels are built
#   DROPE_CUDA_ARCHITECTURES  what the kernels become: sm_80, sm_90, compute_80 (PTX), sm_90a
#   DROPE_SM80_GENCODE, DROPE_SM90A_GENCODE  nvcc's options; no second: no kernels for Hopper alone
# DROPE_CUDA=AUTO takes what it finds, ON stops where something is missing.

# cudaGetDriverEntryPointByVersion, by which tensor maps are encoded, is in no older runtime.
set(DROPE_OLDEST_CUDA 12.5)
set(DROPE_CUDA AUTO CACHE STRING "CUDA kernels: ON, OFF or AUTO")
set(TORCH_CUDA_ARCH_LIST "$ENV{TORCH_CUDA_ARCH_LIST}" CACHE STRING "GPUs, as torch writes them")
set(NVCC_WHEELS "" CACHE STRING "bin folders of nvidia-cuda-nvcc wheels; setup.py knows them")

# The kernels for Ampere use no instruction that came later, so one PTX of theirs (compute_80)
# makes the machine code of every GPU listed: of Hopper too, which runs them for backward and decode
# and would otherwise wait for the driver to compile them. Hopper's own kernels run on nothing else.
function(drope_read_architectures list)
  if(list STREQUAL "")
    set(list "8.0+PTX;9.0a")
  endif()
  set(sass "")
  set(ptx "")
  set(hopper "")
  string(REGEX MATCHALL "[^; ,]+" entries "${list}")
  foreach(entry IN LISTS entries)
    if(NOT entry MATCHES "^([0-9]+)\\.([0-9])[af]?(\\+PTX)?$")
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: expected compute capabilities such as "
                          "\"8.0;9.0a\" or \"8.6+PTX\", got \"${entry}\" in \"${list}\"")
    elseif(CMAKE_MATCH_1 GREATER_EQUAL 8)
      list(APPEND sass sm_${CMAKE_MATCH_1}${CMAKE_MATCH_2})
      if(CMAKE_MATCH_3)
        set(ptx compute_80)
      endif()
      if(entry MATCHES "^9\\.0")
        set(hopper sm_90a)
      endif()
    endif()
  endforeach()
  list(REMOVE_DUPLICATES sass)
  set(gencode ${sass} ${ptx})
  list(TRANSFORM gencode PREPEND "-gencode=arch=compute_80,code=")
  set(DROPE_SM80_GENCODE "${gencode}" PARENT_SCOPE)
  set(DROPE_SM90A_GENCODE "${hopper}" PARENT_SCOPE)
  if(hopper)
    set(DROPE_SM90A_GENCODE "-gencode=arch=compute_90a,code=sm_90a" PARENT_SCOPE)
  endif()
  set(DROPE_CUDA_ARCHITECTURES ${sass} ${ptx} ${hopper} PARENT_SCOPE)
  if(NOT sass)
    set(DROPE_NO_CUDA_REASON "TORCH_CUDA_ARCH_LIST=\"${list}\" names no GPU of compute \
capability 8.0 or later" PARENT_SCOPE)
  endif()
endfunction()

# Sets DROPE_NVCC. A folder that the user names is not searched past.
function(drope_find_nvcc)
  set(DROPE_NVCC "${CMAKE_CUDA_COMPILER}")
  if(NOT DROPE_NVCC AND NOT "$ENV{CUDACXX}" STREQUAL "")
    set(DROPE_NVCC "$ENV{CUDACXX}")
  endif()
  foreach(variable CUDA_HOME CUDA_PATH)
    if(NOT DROPE_NVCC AND NOT "$ENV{${variable}}" STREQUAL "")
      set(DROPE_NVCC "$ENV{${variable}}/bin/nvcc")
      if(NOT EXISTS "${DROPE_NVCC}")
        set(reason "${variable}=$ENV{${variable}} holds no bin/nvcc")
        set(DROPE_NO_CUDA_REASON "${reason}" PARENT_SCOPE)
        return()
      endif()
    endif()
  endforeach()
  if(NOT DROPE_NVCC)
    find_program(found nvcc PATHS ${NVCC_WHEELS} /usr/local/cuda/bin NO_CACHE)
    set(DROPE_NVCC "${found}")
  endif()
  if(DROPE_NVCC)
    set(DROPE_NVCC "${DROPE_NVCC}" PARENT_SCOPE)
  else()
    set(DROPE_NO_CUDA_REASON "no nvcc was found in CUDA_HOME, CUDA_PATH, PATH, an \
nvidia-cuda-nvcc wheel or /usr/local/cuda" PARENT_SCOPE)
  endif()
endfunction()

# Sets DROPE_NO_CUDA_REASON unless nvcc is new enough and builds a kernel for every GPU asked for.
# enable_language(CUDA) would end the configuration where AUTO has to go on without CUDA.
function(drope_check_nvcc)
  execute_process(COMMAND "${DROPE_NVCC}" --version
                  OUTPUT_VARIABLE version ERROR_VARIABLE version RESULT_VARIABLE status)
  if(NOT status STREQUAL "0" OR NOT version MATCHES "release [0-9.]+, V([0-9.]+)")
    set(DROPE_NO_CUDA_REASON "${DROPE_NVCC} --version did not answer as nvcc does" PARENT_SCOPE)
    return()
  endif()
  set(version ${CMAKE_MATCH_1})
  if(version VERSION_LESS DROPE_OLDEST_CUDA)
    set(DROPE_NO_CUDA_REASON "${DROPE_NVCC} is of CUDA ${version}, and ${DROPE_OLDEST_CUDA} \
or later is needed" PARENT_SCOPE)
    return()
  endif()
  set(command "${DROPE_NVCC}" -std=c++17 -shared -Xcompiler=-fPIC -ccbin "${CMAKE_CXX_COMPILER}"
              ${DROPE_NVCC_FLAGS} ${DROPE_SM80_GENCODE} ${DROPE_SM90A_GENCODE}
              "${CMAKE_SOURCE_DIR}/cmake/check_nvcc.cu" -o "${CMAKE_BINARY_DIR}/check_nvcc.so")
  set(key "${version} ${command}")
  if(NOT DROPE_CHECKED_NVCC STREQUAL key)
    execute_process(COMMAND ${command} OUTPUT_VARIABLE said ERROR_VARIABLE said
                    RESULT_VARIABLE status)
    if(NOT status STREQUAL "0")
      string(REGEX MATCH "[^\n]*(error|fatal|cannot|not found)[^\n]*" line "${said}")
      set(DROPE_NO_CUDA_REASON "${DROPE_NVCC} cannot build a small kernel (${line})" PARENT_SCOPE)
      return()
    endif()
    set(DROPE_CHECKED_NVCC "${key}" CACHE INTERNAL "The nvcc that built check_nvcc.cu")
  endif()
  set(DROPE_CUDA_VERSION ${version} PARENT_SCOPE)
endfunction()

set(DROPE_CUDA_VERSION "")
set(DROPE_NO_CUDA_REASON "")
drope_read_architectures("${TORCH_CUDA_ARCH_LIST}")
if(NOT DROPE_CUDA MATCHES "^(ON|OFF|AUTO)$")
  message(FATAL_ERROR "DROPE_CUDA must be ON, OFF or AUTO, got '${DROPE_CUDA}'")
elseif(DROPE_CUDA STREQUAL "OFF")
  set(DROPE_NO_CUDA_REASON "DROPE_CUDA=OFF asked for the CPU alone")
endif()
if(NOT DROPE_NO_CUDA_REASON)
  drope_find_nvcc()
endif()
if(NOT DROPE_NO_CUDA_REASON)
  # nvcc of the wheels looks for its runtime in lib64, and they bring it in lib.
  cmake_path(GET DROPE_NVCC PARENT_PATH nvcc_bin)
  if(EXISTS "${nvcc_bin}/../lib/libcudart_static.a")
    set(DROPE_NVCC_FLAGS "-L${nvcc_bin}/../lib")
  endif()
  drope_check_nvcc()
endif()

if(DROPE_CUDA_VERSION)
  set(CMAKE_CUDA_COMPILER "${DROPE_NVCC}")
  set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}" CACHE FILEPATH "")
  set(CMAKE_CUDA_FLAGS_INIT "${DROPE_NVCC_FLAGS}")
  set(CMAKE_CUDA_ARCHITECTURES OFF)
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_EXTENSIONS OFF)
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  # -lineinfo: profilers name source lines; it changes no machine code.
  set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -lineinfo")
  list(JOIN DROPE_CUDA_ARCHITECTURES " " architectures)
  message(STATUS "CUDA ${DROPE_CUDA_VERSION}: ${architectures}")
elseif(DROPE_CUDA STREQUAL "ON")
  message(FATAL_ERROR "DROPE_CUDA=ON, but ${DROPE_NO_CUDA_REASON}. Install CUDA "
                      "${DROPE_OLDEST_CUDA} or later and name its folder in CUDA_HOME, or "
                      "`pip install nvidia-cuda-nvcc`; DROPE_CUDA=OFF builds for the CPU alone.")
else()
  set(DROPE_CUDA_ARCHITECTURES "")
  message(STATUS "No CUDA kernels: ${DROPE_NO_CUDA_REASON}")
endif()

# An OBJECT library of kernels, compiled for the GPUs of `gencode` and no others.
function(drope_add_kernels name gencode)
  add_library(${name} OBJECT ${ARGN})
  target_include_directories(${name} PRIVATE csrc)
  target_compile_options(${name} PRIVATE ${gencode} -Xptxas=-v -Xcompiler=-Wall,-Wextra)
  if(DROPE_CUDA_VERSION VERSION_GREATER_EQUAL 13.0)
    # A ninth of the size. Every driver of CUDA 13 unpacks it; those of early CUDA 12 do not.
    target_compile_options(${name} PRIVATE --compress-mode=size)
  endif()
  set(launcher sh ${CMAKE_SOURCE_DIR}/cmake/keep_ptxas_log.sh ${CMAKE_CUDA_COMPILER_LAUNCHER})
  set_target_properties(${name} PROPERTIES CUDA_COMPILER_LAUNCHER "${launcher}")
endfunction()
