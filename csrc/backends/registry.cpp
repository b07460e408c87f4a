#include "registry.hpp"

#include "host/host_backend.hpp"
#include "sidp/error.hpp"

namespace sidp {

std::vector<std::string> backend_names() { return {"host"}; }

std::shared_ptr<Backend> make_backend(const BackendOptions& options, std::shared_ptr<Bootstrap> bootstrap) {
  if (options.name == "host")
    return std::make_shared<host::HostBackend>(host::HostOptions{options.rank, options.world_size, options.token},
                                               std::move(bootstrap));
  throw Error(ErrorCode::kUnsupported, "backend '" + options.name + "' is not in this build; it has: host");
}

}  // namespace sidp
