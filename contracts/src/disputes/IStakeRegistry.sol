// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";

/// @title What Disputes needs of StakeRegistry
/// @dev An interface of its own, so that a change of the registry's inside does not change the code of Disputes.
interface IStakeRegistry {
    /// @notice The ERC-20 that is staked.
    function token() external view returns (IERC20);

    /// @notice The only address that may lock, unlock and slash.
    function disputes() external view returns (address);

    /// @notice Seconds between the last `beginUnbond` and `withdraw`.
    function unbondingDelay() external view returns (uint40);

    /// @notice Owner (zero for an operator that never registered) and role bits of a node.
    function identity(address operator) external view returns (address owner, uint8 roles);

    /// @notice Base units of a node that no dispute holds.
    function lockable(address operator) external view returns (uint256);

    function lock(address operator, uint96 amount) external;
    function unlock(address operator, uint96 amount) external;
    function slash(address operator, uint96 amount, address to) external;
}
