//! etcd's gRPC code for each of its errors

use tonic::{Code, Status};

use crate::store::Refused;

impl From<Refused> for Status {
    fn from(refused: Refused) -> Self {
        Self::new(code(refused), refused.to_string())
    }
}

pub(super) fn code(refused: Refused) -> Code {
    use Refused as R;
    match refused {
        R::EmptyKey | R::KeyNotFound | R::ValueProvided | R::LeaseProvided => Code::InvalidArgument,
        R::TooManyOps | R::DuplicateKey | R::TooLarge => Code::InvalidArgument,
        R::UserEmpty | R::AuthFailed | R::InvalidAuthManagement => Code::InvalidArgument,
        R::Compacted | R::FutureRevision | R::LeaseTtlTooLarge => Code::OutOfRange,
        R::LeaseNotFound => Code::NotFound,
        R::LeaseExists | R::RootUserNotExist | R::RootRoleNotGranted => Code::FailedPrecondition,
        R::UserAlreadyExist | R::UserNotFound | R::AuthNotEnabled => Code::FailedPrecondition,
        R::RoleAlreadyExist | R::RoleNotFound | R::RoleNotGranted => Code::FailedPrecondition,
        R::PermissionDenied => Code::PermissionDenied,
        R::InvalidAuthToken => Code::Unauthenticated,
        R::Unimplemented(_) => Code::Unimplemented,
        // A watch's own, which come as a reason in a response.
        R::EmptyWatchRange | R::DuplicateWatchId => Code::Unknown,
    }
}
