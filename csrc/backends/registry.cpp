#include "registry.hpp"

#include "host/host_backend.hpp"
#include "sidp/error.hpp"
#ifdef SIDP_HAS_NVSHMEM
#include "nvshmem/nvshmem_backend.hpp"
#endif

namespace sidp {

std::vector<std::string> backend_names() {
#ifdef SIDP_HAS_NVSHMEM
  return {"host", "nvshmem"};
#else
  return {"host"};
#endif
}

std::shared_ptr<Backend> make_backend(const BackendOptions& options, std::shared_ptr<Bootstrap> bootstrap) {
  if (options.name == "host")
    return std::make_shared<host::HostBackend>(host::HostOptions{options.rank, options.world_size, options.token},
                                               std::move(bootstrap));
#ifdef SIDP_HAS_NVSHMEM
  if (options.name == "nvshmem")
    return std::make_shared<nvshmem::NvshmemBackend>(
        nvshmem::NvshmemOptions{options.rank, options.world_size, options.token, options.device, options.gpus,
                                options.deadline, options.test_without_mappings},
        std::move(bootstrap));
#endif
  std::string names;
  for (const std::string& name : backend_names()) names += ' ' + name;
  throw Error(ErrorCode::kUnsupported, "backend '" + options.name + "' is not in this build; it has:" + names);
}

}  // namespace sidp
